"""Loading a teacher's weights and tokenizer, and their fingerprints.

Whatever makes that impossible becomes one clear line. Fingerprints are of what was loaded, and
independent of where it was loaded from.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from kvdistill.attention.geometry import quantisation, text_model
from kvdistill.attention.model_folder import (
    loading_fault,
    weights_fault,
    without_progress_bars,
)
from kvdistill.attention.tokens import load_fast_tokenizer
from kvdistill.attention.verification import TOLERANCE, probe_ids, run_probe
from kvdistill.config.extraction import TeacherConfig
from kvdistill.errors import TeacherError
from kvdistill.text import shorten


def load_teacher_model(
    name: str, config: TeacherConfig, device: torch.device, *, predicts: bool = False
) -> tuple[Any, set[str]]:
    """A model in eval mode on ``device``: the base model, or with its head where it generates.

    And if ``predicts``, where it predicts text.

    Also the names of parameters that the checkpoint lacks, which transformers initialises at
    random: none of them may belong to a layer.

    Raises:
        TeacherError: not found, gated, unreadable, pickled weights, weights that are not
            the config's, or quantised in a way that needs a package or a device that is not there.
    """
    from transformers import AutoModel

    options: dict[str, Any] = {
        "trust_remote_code": config.trust_remote_code,
        "dtype": getattr(torch, config.dtype),
        # None makes transformers choose sdpa, or eager where sdpa cannot compute the model.
        "attn_implementation": (
            None if config.attn_implementation == "sdpa" else config.attn_implementation
        ),
    }
    quantised = None
    try:
        architecture = load_teacher_config(config)
        kind = _auto_class(config, architecture, predicts=predicts)
        has_head = kind is not AutoModel
        if config.weights == "random":
            model = _random_model(kind, architecture, options)
            if has_head and config.generate is None:
                body = _random_model(AutoModel, architecture, options)  # the same as without head
                model.base_model.load_state_dict(body.state_dict(), strict=False)
            return model.to(device), set()
        quantised = quantisation(architecture)
        if config.gguf_file:
            options["gguf_file"] = config.gguf_file
        # Quantised weights are unpacked on their device, and most cannot be moved afterwards.
        device_map = {"": device} if quantised and config.device_map is None else config.device_map
        if device_map is not None:
            options["device_map"] = device_map
        if config.tp_plan is not None:
            options["distributed_config"] = _sharding(name, kind, architecture)
        with without_progress_bars():
            model, info = kind.from_pretrained(
                config.model,
                revision=config.revision,
                use_safetensors=None if config.gguf_file else True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `weights_fault` names them
                **options,
            )
        if quantised is not None:
            run_probe(text_model(model))
    except (torch.OutOfMemoryError, TeacherError):
        raise
    except Exception as error:  # quantisers and remote code raise anything
        raise _cannot_load(name, config.model, error, quantised) from error
    if quantised or config.gguf_file:  # packed under names of their own
        info["unexpected_keys"] = ()
    if fault := weights_fault(model, info, with_heads=has_head):
        raise TeacherError(f"teacher {name!r}: {config.model}: {fault}")
    model = model.eval().requires_grad_(False)
    _read_decoder_start(model, config)
    missing = set(info["missing_keys"])
    is_placed = device_map is not None or config.tp_plan is not None
    return model if is_placed else model.to(device), missing


def _sharding(name: str, kind: Any, architecture: Any) -> Any:
    """How transformers shards a model over processes: its own plan, all heads in every process.

    Weights of attention are sharded like others, and their outputs gathered: keys and values are
    captured whole, and verified as those of any model.

    Raises:
        TeacherError: there are no processes, or there is no such plan.
    """
    from transformers.distributed import DistributedConfig

    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise TeacherError(
            f"teacher {name!r} has a tp_plan, which needs several processes: `torchrun "
            f"--nproc_per_node=GPUS -m kvdistill.cli extract CONFIG --teacher {name}`"
        )
    with torch.device("meta"):
        plan = kind.from_config(architecture)._tp_plan or {}
    gathered = {"colwise": "colwise_gather_output", "rowwise": "rowwise_split_input"}
    rules = {x: gathered.get(rule, rule) for x, rule in plan.items() if "attn" in x}
    known = {*gathered.values(), "replicated_with_grad_allreduce"}
    if not rules or not {*rules.values()} <= known or quantisation(architecture):
        raise TeacherError(
            f"teacher {name!r}: transformers has no tensor-parallel plan for this model that keeps "
            "its heads whole; use device_map: auto instead of tp_plan"
        )
    return DistributedConfig(tp_plan=rules)


def native_dtype(device: torch.device) -> str:
    """What ``dtype: auto`` is on a device: bfloat16 where a GPU computes in it, else float32."""
    is_native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if is_native else "float32"


def load_teacher_config(config: TeacherConfig) -> Any:
    """The config of a teacher's model, without its weights."""
    from transformers import AutoConfig

    options = {"gguf_file": config.gguf_file} if config.gguf_file else {}
    return AutoConfig.from_pretrained(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        **options,
    )


def outlined_teacher(name: str, config: TeacherConfig) -> Any:
    """The text model of a teacher without its weights, on the meta device.

    Raises:
        TeacherError: not found, gated, or of a type that cannot be built.
    """
    try:
        architecture = load_teacher_config(config)
        with torch.device("meta"):
            model = _auto_class(config, architecture, predicts=False).from_config(
                architecture, trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # remote code raises anything
        raise _cannot_load(name, config.model, error) from error
    return text_model(model)


def _auto_class(config: TeacherConfig, architecture: Any, *, predicts: bool) -> Any:
    """Where transformers finds the model; with its head, a multimodal one is listed elsewhere.

    Masked language models are listed as causal ones too, which their config may make of them.
    """
    import transformers as found

    kind, paired = type(architecture), architecture.is_encoder_decoder
    causal = kind in found.MODEL_FOR_CAUSAL_LM_MAPPING
    multimodal = not causal and kind in found.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    own = "AutoModelForCausalLM" in (getattr(architecture, "auto_map", None) or {})
    masked = kind in found.MODEL_FOR_MASKED_LM_MAPPING
    masked = masked and not getattr(architecture, "is_decoder", False)
    listed = config.stream == "decoder" if paired else causal or multimodal or own
    if config.generate is None and not (predicts and listed and (paired or not masked)):
        return found.AutoModel
    if paired:
        return found.AutoModelForSeq2SeqLM
    return found.AutoModelForImageTextToText if multimodal else found.AutoModelForCausalLM


def text_model_of(name: str, whole: Any) -> Any:
    """The layers of a teacher that read text; of a multimodal model, its language model.

    That one is compared with the whole on a few tokens: what it reads from text alone must be what
    the whole reads.

    Raises:
        TeacherError: they differ, or the whole cannot read text alone.
    """
    text = text_model(whole)
    if text.get_output_embeddings() is not None:
        return _without_head(text)
    outer = whole.base_model
    if text is outer or text.config.is_encoder_decoder:
        return text
    ids = probe_ids(text)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    inputs["output_hidden_states"] = True
    kinds = f"{type(text).__name__} inside {type(outer).__name__}"
    try:
        with torch.inference_mode():
            own, other = (model(**inputs).hidden_states[-1] for model in (text, outer))
    except Exception as error:  # whatever a model raises that wants an image
        cause = shorten(str(error), 200)
        raise TeacherError(
            f"teacher {name!r}: {kinds} cannot be read on text alone: {type(error).__name__}: "
            f"{cause}; save the language model in a folder of its own and use that"
        ) from error
    difference = float((own - other).abs().max() / other.abs().max().clamp_min(1e-30))
    if not difference <= 10 * TOLERANCE[own.dtype]:
        raise TeacherError(
            f"teacher {name!r}: {kinds} reads text otherwise than the whole model does (hidden "
            f"states differ by {difference:.1e}); save the language model in a folder of its own "
            "and use that"
        )
    return text


def _without_head(whole: Any) -> Any:
    """The base model around the modules of a whole one that does not contain it (T5)."""
    from transformers import AutoModel

    with torch.device("meta"):
        base = AutoModel.from_config(whole.config)
    for name in [name for name, _ in base.named_children()]:
        setattr(base, name, getattr(whole, name))
    return base.eval()


def _read_decoder_start(model: Any, config: TeacherConfig) -> None:
    """Give an encoder-decoder's config the start token that only its generation config states."""
    from transformers import GenerationConfig

    own = getattr(model.config, "decoder_start_token_id", None)
    if own is not None or not model.config.is_encoder_decoder:
        return
    try:
        found = GenerationConfig.from_pretrained(config.model, revision=config.revision)
    except OSError:  # a folder without one; what needs a start token then refuses in words
        return
    model.config.decoder_start_token_id = found.decoder_start_token_id


def _random_model(kind: Any, architecture: Any, options: dict[str, Any]) -> Any:
    """The model's architecture with random weights: a placebo for what it has learned.

    The seed is fixed, so that every process of an extraction reads with the same teacher.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(architecture, **options)
    return model.eval().requires_grad_(False)


def load_teacher_tokenizer(name: str, config: TeacherConfig) -> Any:
    """The teacher's fast tokenizer; its offsets are whole ones.

    Raises:
        TeacherError: not found, or without character offsets.
    """
    source, own = config.tokenizer or config.model, dict[str, Any]()
    if config.tokenizer is None:
        own = {"revision": config.revision}
        own |= {"gguf_file": config.gguf_file} if config.gguf_file else {}
    return load_fast_tokenizer(
        source,
        lambda fault: TeacherError(f"teacher {name!r}: {fault}"),
        trust_remote_code=config.trust_remote_code,
        **own,
    )


def _cannot_load(
    name: str, source: str, error: Exception, quantised: str | None = None
) -> TeacherError:
    remedy = (
        f"its weights are quantised by {quantised}: install the package or use the device that "
        "this asks for, or an unquantised checkpoint"
    )
    fault = loading_fault(source, error, remedy=remedy if quantised else "")
    return TeacherError(f"teacher {name!r}: cannot load {source!r}: {fault}")


def weights_fingerprint(
    model: Any, excluded: Collection[str] = (), *, quantised: bool = False
) -> str:
    """xxh3 over every parameter's name, dtype, shape and bytes, in order of names.

    ``excluded`` are parameters that the checkpoint lacks (a BERT without its pooler): they are
    random, and keys and values do not depend on them. Quantised weights are packed into buffers
    (GPTQ) or into several tensors (torchao, bitsandbytes), all of which count.
    """
    stated = model.state_dict() if quantised else dict(model.named_parameters())
    return _fingerprint({name: x for name, x in stated.items() if name not in excluded})


def _fingerprint(stated: Mapping[str, Any], text: str = "") -> str:
    digest = xxhash.xxh3_128(text.encode())
    for name, tensor in _plain_tensors(stated):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return f"xxh3:{digest.hexdigest()}"


def state_fingerprint(model: Any, predicting: Any = None, generating: Any = None) -> str:
    """xxh3 over persistent buffers, a model's own code, and what else of the whole model is used.

    That is the head if ``predicting``, and the end tokens too if ``generating``. Other buffers are
    computed from the config, as rotary frequencies are wherever they are kept.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {k: x for k, x in model.state_dict().items() if k not in parameters}
    stated = {name: x for name, x in buffers.items() if not name.endswith("inv_freq")}
    module = sys.modules[type(model).__module__]
    text = inspect.getsource(module) if "transformers_modules" in module.__name__ else ""
    if (whole := generating or predicting) is not None:
        stated |= whole.get_output_embeddings().state_dict(prefix="head.")
    if generating is not None:
        text += f" ends at {generating.generation_config.eos_token_id}"
    return _fingerprint(stated, text)


def _plain_tensors(named: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in order of their names; one that is made of others (torchao) gives these."""
    for name, tensor in sorted(named.items()):
        if isinstance(tensor, DTensor):  # sharded over processes
            yield name, tensor.full_tensor()
        elif hasattr(tensor, "__tensor_flatten__"):
            parts, _ = tensor.__tensor_flatten__()
            yield from _plain_tensors({f"{name}.{part}": getattr(tensor, part) for part in parts})
        elif isinstance(tensor, Tensor):
            yield name, tensor
