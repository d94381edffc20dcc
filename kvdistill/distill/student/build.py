"""The student and its tokenizer: loaded, built from scratch, or only checked.

Character alignment needs offsets, so the tokenizer must be a fast one.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, Literal

import torch

from kvdistill.attention.geometry import (
    StudentGeometry,
    position_limit,
    quantisation,
    text_model,
)
from kvdistill.attention.kv_capture import KVCapture
from kvdistill.attention.model_folder import (
    loading_fault,
    weights_fault,
    without_progress_bars,
)
from kvdistill.attention.prompt_template import OWN_TEMPLATE, own_prompt, own_template
from kvdistill.attention.tokens import load_fast_tokenizer, num_token_ids, with_ends
from kvdistill.config.training import StudentConfig
from kvdistill.corpus.samples import Sample
from kvdistill.distill.student.lora import adapt
from kvdistill.errors import KVDistillError, StudentError
from kvdistill.text import brief, near

END_OF_TEXT: Final = "<|endoftext|>"

FORMER_SETTINGS: Final = {
    "model_type", "attn_implementation", "torch_dtype", "num_labels", "rope_theta", "rope_scaling",
    "partial_rotary_factor",
}  # fmt: skip
"""Settings that transformers reads although no config declares them."""


def build_student(config: StudentConfig, tokenizer: Any, seed: int) -> Any:
    """Load the pretrained student, or initialise one from scratch.

    Args:
        config: which student.
        tokenizer: the student's; sets the vocabulary size of a student from scratch.
        seed: of a student's initial weights and of its LoRA adapters.

    Returns:
        A transformers causal LM in float32, with adapters where ``config.lora`` is set.

    Raises:
        StudentError: not found, an invalid architecture, or fewer embeddings than tokens.
        MissingExtra: LoRA without peft.
    """
    from transformers import AutoModelForCausalLM

    with one_line_errors(
        f"build the student {config.model or 'of student.architecture'}", config.model
    ):
        architecture = _architecture(config, tokenizer)
        if config.model is not None:
            student = load_causal_lm(
                config.model, dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                student = AutoModelForCausalLM.from_config(architecture)
    _require_embeddings(student, tokenizer)
    if student.config.get_text_config() is not student.config:
        _freeze_all_but_text(student)
    return student if config.lora is None else adapt(student, config.lora, seed)


def load_causal_lm(source: str | Path, **options: Any) -> Any:
    """Load a model; raises StudentError unless the weights are those that its config describes."""
    from transformers import AutoModelForCausalLM

    with without_progress_bars():
        model, info = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if fault := weights_fault(model, info):
        raise StudentError(f"{source}: {fault}")
    return model


def _freeze_all_but_text(student: Any) -> None:
    """Leave what only images pass through as it is: no text gives it a gradient."""
    trained = (text_model(student), student.get_output_embeddings())
    kept = {id(parameter) for module in trained for parameter in module.parameters()}
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) in kept)


def _require_embeddings(student: Any, tokenizer: Any) -> None:
    """Refuse tokens without an embedding; padding is masked, so it may be any other special token.

    Raises:
        StudentError: names the number of tokens and of embeddings.
    """
    num_embeddings = student.get_input_embeddings().weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= num_embeddings)
    others = [tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token]
    usable = [token for token in others if token and vocabulary[token] < num_embeddings]
    if [token for _, token in beyond] == [tokenizer.pad_token] and usable:
        tokenizer.pad_token = usable[0]
    elif beyond:
        raise StudentError(
            f"student: expected at least {num_token_ids(tokenizer)} embeddings, one per token id, "
            f"got {num_embeddings}, so {beyond[0][1]!r} has none; set student.tokenizer to the "
            "model's own"
        )


def require_positions(student: Any, needed: int, setting: str) -> None:
    """Refuse a setting by which a text has more tokens than the student has positions.

    Raises:
        StudentError: names the setting and both numbers.
    """
    positions = position_limit(student)
    if positions is not None and needed > positions:
        raise StudentError(
            f"{setting}: {needed} tokens, but the student ({type(student).__name__}) has "
            f"{positions} positions; set it to {positions} or less, or take a student with more"
        )


def check_student(config: StudentConfig, tokenizer: Any, max_length: int = 1) -> StudentGeometry:
    """Check without loading weights that a student can be built and its KV captured.

    Raises:
        StudentError: as ``outlined_student``, or no adapter locates its keys and values.
    """
    return KVCapture(outlined_student(config, tokenizer, max_length)).geometry


def outlined_student(
    config: StudentConfig, tokenizer: Any, max_length: int = 1, device: str = "meta"
) -> Any:
    """The student without its weights: on the meta device none at all, on others random ones.

    Raises:
        StudentError: as ``build_student``, or fewer positions than ``max_length``.
    """
    from transformers import AutoModelForCausalLM

    what = f"build the student {config.model or 'of student.architecture'}"
    with one_line_errors(what, config.model), torch.device(device):
        student = AutoModelForCausalLM.from_config(
            _architecture(config, tokenizer), trust_remote_code=config.trust_remote_code
        )
    _require_embeddings(student, tokenizer)
    require_positions(student, max_length, "training.max_length")
    return student


def load_student_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load a fast tokenizer from a folder or hub id; its offsets are whole ones.

    Raises:
        StudentError: not found, or a tokenizer without character offsets.
    """
    return load_fast_tokenizer(name, StudentError, trust_remote_code=trust_remote_code)


def tokenizer_of(config: StudentConfig) -> Any:
    """The student's tokenizer, which records whether it reads in its own chat template.

    Raises:
        StudentError: as ``load_student_tokenizer``, or a chat template that cannot be used.
    """
    tokenizer = load_student_tokenizer(
        config.tokenizer or str(config.model), config.trust_remote_code
    )
    tokenizer.init_kwargs.pop(OWN_TEMPLATE, None)  # of the run that saved it
    if config.chat_template == "own":
        day = config.template_date
        tokenizer.init_kwargs[OWN_TEMPLATE] = day.isoformat() if day else ""
        with one_line_errors("use student.chat_template", config.model, "tokenizer.json"):
            own_template(tokenizer)
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer; every text round-trips and has exact offsets.

    Returns:
        A ``PreTrainedTokenizerFast`` whose BOS, EOS and padding token is ``<|endoftext|>``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def character_tokenizer(texts: Iterable[str]) -> Any:
    """Build a tokenizer with one token per character in ``texts``, for small formal languages.

    Returns:
        A ``PreTrainedTokenizerFast`` with separate BOS, EOS, padding and unknown tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    characters = sorted({character for text in texts for character in text})
    vocab = {token: i for i, token in enumerate([*special.values(), *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, without special tokens."""
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return ids


def question_ids(tokenizer: Any, samples: Sequence[Sample]) -> list[list[int]]:
    """Token ids of what an answer is generated from, in the student's chat template or as it is."""
    if own_template(tokenizer) is None:
        return prompt_ids(tokenizer, [sample.question for sample in samples])
    pairs = ((sample, own_prompt(tokenizer, sample)) for sample in samples)
    return token_ids(tokenizer, [p.until(len(s.question)) if p else s.text for s, p in pairs])


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, after one BOS where the tokenizer has it."""
    return [with_ends(tokenizer, ids, eos=False)[0] for ids in token_ids(tokenizer, texts)]


def _architecture(config: StudentConfig, tokenizer: Any) -> Any:
    """The student's transformers config; from scratch, with the tokenizer's special tokens.

    Raises:
        StudentError: no causal language model, quantised weights, or unknown settings.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if config.model is not None:
        found = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(found, "auto_map"):
            raise StudentError(
                f"transformers has no causal language model of type {found.model_type!r}; of a "
                "multimodal model, save the language model in a folder of its own and use that"
            )
        if method := quantisation(found):
            raise StudentError(
                f"its weights are quantised by {method}, and training needs plain ones; save it "
                "dequantised and use that"
            )
        return found
    tokens = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    architecture = config.architecture or {}
    kind = architecture["model_type"]
    if kind not in CONFIG_MAPPING:
        known = near(str(kind), CONFIG_MAPPING)
        raise StudentError(f"transformers has no model_type {brief(kind)}{known}")
    _refuse_unknown(architecture, CONFIG_MAPPING[kind])
    settings = {"vocab_size": num_token_ids(tokenizer), **tokens, **architecture}
    return AutoConfig.for_model(**settings)


def _refuse_unknown(settings: Mapping[str, Any], kind: Any) -> None:
    """Refuse settings that no code of a model reads: transformers keeps any that it is given."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    known = {field.name for field in fields(kind)} | set(kind.attribute_map) | FORMER_SETTINGS
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    code = "" if causal is None else inspect.getsource(sys.modules[causal.__module__])
    for name, value in settings.items():
        if name in kind.sub_configs and isinstance(value, Mapping):
            _refuse_unknown(value, kind.sub_configs[name])
        # Some are read that the config's class does not declare, such as Qwen 2's head_dim.
        if name not in known and not re.search(rf"\b{re.escape(name)}\b", code):
            hint = near(name, known)
            raise StudentError(f"{kind.model_type} has no setting {brief(name)}{hint}")


@contextmanager
def one_line_errors(
    what: str, source: str | None, needed: Literal["config.json", "tokenizer.json"] = "config.json"
) -> Iterator[None]:
    """Turn any error of transformers into a one-line ``StudentError``: cannot do ``what``."""
    try:
        yield
    except KVDistillError as error:
        raise StudentError(f"cannot {what}: {error}") from error
    except Exception as error:  # OSError, ValueError, KeyError and more
        remedy = "" if source else "correct student.architecture"
        fault = loading_fault(source or "architecture", error, needed, remedy)
        raise StudentError(f"cannot {what}: {fault}") from error
