"""What a model does with its tokens is measured on the model in hand, not taken from a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, GenerationConfig

from kvdistill.attention.adapters import OPT, PLAIN, separate_heads_first
from kvdistill.attention.fitting import first_fitting, fit_adapter
from kvdistill.attention.kv_capture import verify_student
from kvdistill.corpus.samples import Sample
from kvdistill.errors import AdapterError, StudentError, TeacherError
from kvdistill.extract.extract_shard import extract_samples
from kvdistill.extract.loading import load_teacher_tokenizer
from kvdistill.extract.teacher import Teacher, load_teacher
from kvdistill.extract.tokenise import batch_by_tokens
from tests.attention.families import DECODERS, ENCODER_DECODERS, ENCODERS
from tests.attention.tiny_configs import tiny_config
from tests.extract.models import TEXTS, save_teacher, tiny_model, tiny_tokenizer
from tests.pipelines.test_teachers import make

B = DECODERS["llama"][1]
LONGROPE: dict[str, Any] = {
    **B,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 5.0, 6.0, 7.0],
        "original_max_position_embeddings": 64,
    },
}


def model_of(model_type: str, **options: Any) -> Any:
    """A small model of any type, its settings shrunk by name."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **options)
    return AutoModel.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("model_type", "options", "kind"),
    [
        ("llama", {}, "decoder"),
        ("llama", {"is_causal": False}, "encoder"),
        ("llama", {"is_causal": False, "num_hidden_layers": 1}, "encoder"),
        ("eurobert", {}, "encoder"),
        ("nomic_bert", {}, "encoder"),
        ("gte", {}, "encoder"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "encoder"),
        ("gemma3_text", {}, "decoder"),
        ("bert", {}, "encoder"),
        ("bert", {"is_decoder": True}, "decoder"),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "conv"]}, "decoder"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_is_what_it_does(
    model_type: str, options: dict[str, Any], kind: str, dtype: torch.dtype
) -> None:
    verified = fit_adapter("t", model_of(model_type, **options).to(dtype), None)
    assert verified.kind == kind
    assert {layer.mask.causal for layer in verified.layers} == {kind == "decoder"}


def test_an_encoder_by_its_flag_is_no_student() -> None:
    model = tiny_model("llama", head=True, **B, is_causal=False)
    with pytest.raises(StudentError, match="an encoder cannot be a student"):
        verify_student(model)


def test_a_decoder_that_shifts_its_tokens_is_not_read_as_one_that_does_not() -> None:
    """BART without decoder_input_ids shifts its input: key j would belong to token j - 1."""
    model = tiny_model("bart", **ENCODER_DECODERS["bart"][1])
    with pytest.raises(AdapterError, match="reads other tokens than it is given"):
        first_fitting(model, [OPT])


@pytest.mark.parametrize("model_type", ["plbart", "nllb-moe", "t5gemma"])
def test_an_unknown_encoder_decoder_is_read_by_stream(model_type: str) -> None:
    model = model_of(model_type)
    with pytest.raises(TeacherError, match="is an encoder-decoder; set its `stream`"):
        fit_adapter("t", model, None)
    for stream in ("encoder", "decoder"):
        verified = fit_adapter("t", model, stream)  # type: ignore[arg-type]
        assert (verified.kind, verified.adapter.stream) == ("encoder_decoder", stream)
        assert {layer.mask.causal for layer in verified.layers} == {stream == "decoder"}


def test_a_tap_behind_the_rotation_is_not_taken_for_no_rotation() -> None:
    """HunYuan norms after it has rotated; what leaves its norms equals what its attention reads."""
    model = model_of("hunyuan_v1_dense", num_key_value_heads=2, head_dim=8)
    taps = ("query_layernorm", "key_layernorm", "v_proj")
    behind = replace(PLAIN, taps=taps, cut=separate_heads_first, name="behind")
    with pytest.raises(AdapterError, match="captured behind the rotation"):
        first_fitting(model, [behind])


@pytest.mark.parametrize(
    ("model_type", "options", "encoding"),
    [
        ("llama", B, "rotary"),
        ("gpt2", DECODERS["gpt2, fused"][1], "absolute"),
        ("opt", DECODERS["opt, scaled queries"][1], "absolute"),
        ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, "absolute"),
        ("falcon", DECODERS["falcon, alibi"][1], "relative"),
        ("bert", ENCODERS["bert"][1], "absolute"),
        ("smollm3", {**B, "no_rope_layers": [0, 0, 0]}, "none"),
    ],
)
def test_positions_are_described_as_they_act(
    tmp_path: Path, model_type: str, options: dict[str, Any], encoding: str
) -> None:
    save_teacher(tmp_path / "t", model_type, **options, base={})
    assert load_teacher("t", make(tmp_path, {})).manifest.position_encoding == encoding


def codes(teacher: Teacher, texts: list[str]) -> list[np.ndarray[Any, Any]]:
    """Stored keys and values of each text, read in one extraction."""
    samples = [Sample(str(i), (("text", text),)) for i, text in enumerate(texts)]
    shard = extract_samples(teacher, samples, batch_tokens=4096).shard
    spans = [shard.tokens.span(i) for i in range(len(texts))]
    arrays = [shard.arrays[kind].astype(np.float32) for kind in ("key", "value")]
    return [np.concatenate([x[:, :, span] for x in arrays], axis=-1) for span in spans]


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("convbert", {}), ("phi3", LONGROPE), ("llama", B), ("bert", {})],
    ids=["leaking convolution", "longrope", "llama", "bert"],
)
def test_the_same_sample_has_the_same_codes_in_every_batch(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    config = tiny_config(model_type, **options)
    config.vocab_size = len(tokenizer := tiny_tokenizer())
    AutoModel.from_config(config).save_pretrained(tmp_path / "t")
    tokenizer.save_pretrained(tmp_path / "t")
    codec = {"codec": {"key": "fp16", "value": "fp16"}}
    teacher = load_teacher("t", make(tmp_path, {}, **codec))
    texts = ["Short.", TEXTS[0] + TEXTS[1], TEXTS[0][:50], "Other."]
    together = codes(teacher, texts)
    for text, found in zip(texts, together, strict=True):
        (alone,) = codes(teacher, [text])
        np.testing.assert_allclose(found, alone, rtol=1e-3, atol=1e-3 * np.abs(alone).max())


def test_batches_are_split_only_where_texts_change_one_another() -> None:
    def rule(model_type: str, **options: Any) -> tuple[int | None, bool]:
        batches = fit_adapter("t", model_of(model_type, **options), None).batches
        return batches.padded_to, batches.alone

    assert rule("llama") == rule("bert") == rule("mixtral") == (None, False)
    assert rule("convbert") == (0, False)
    assert rule("phi3", **LONGROPE) == (64, False)


class Stumbles(torch.nn.Module):
    def forward(self, *args: Any, **options: Any) -> Any:
        raise KeyError("an option that\nonly its own generate passes")


def test_what_a_stranger_raises_is_one_line_of_model_step_and_cause() -> None:
    model = tiny_model("llama", head=True, **B)
    model.model.norm = Stumbles()
    lines = []
    with pytest.raises(TeacherError, match="KeyError: 'an option that") as error:
        fit_adapter("t", model.model, None)
    lines.append(str(error.value))
    with pytest.raises(StudentError, match="KeyError: 'an option that") as failed:
        verify_student(model)
    lines.append(str(failed.value))
    for line in lines:
        assert "\n" not in line
        assert "LlamaModel (llama) failed in verifying adapter" in line


def test_layers_that_share_keys_are_named() -> None:
    model = model_of("gemma3n_text")
    verified = fit_adapter("t", model, None)
    assert [layer.layer_idx for layer in verified.layers] == [0, 1]
    assert verified.skipped.keys() == {2, 3}
    assert all("keys and values of an earlier layer" in why for why in verified.skipped.values())


def test_the_manifest_of_a_bidirectional_llama_is_an_encoders(tmp_path: Path) -> None:
    """What ``losses.inject`` is refused by: an answer leaks into an encoder's prompt."""
    save_teacher(tmp_path / "t", is_causal=False)
    assert load_teacher("t", make(tmp_path, {})).manifest.kind == "encoder"


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("llama", {"eos_token_id": [2, 5]}), ("lfm3", {})],
    ids=["several end tokens", "layer types without a rotation"],
)
def test_what_configs_may_hold_is_read(model_type: str, options: dict[str, Any]) -> None:
    assert fit_adapter("t", model_of(model_type, **options), None).kind == "decoder"


def test_a_start_token_may_be_in_the_generation_config(tmp_path: Path) -> None:
    """T5 saved by transformers 5 states it there alone."""
    options = {**ENCODER_DECODERS["t5"][1]}
    del options["decoder_start_token_id"]
    save_teacher(tmp_path / "t", "t5", **options, base={})
    experiment = make(tmp_path, {"stream": "decoder"})
    with pytest.raises(TeacherError, match="no decoder_start_token_id, nor has its generation"):
        codes(load_teacher("t", experiment), ["one"])
    GenerationConfig(decoder_start_token_id=7).save_pretrained(tmp_path / "t")
    teacher = load_teacher("t", experiment)
    (tokens,) = teacher.tokenise([Sample("a", (("text", "one"),))])
    assert tokens.token_ids[0] == 7


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    weights = tmp_path / "t" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(TeacherError, match="teacher 't': cannot load") as error:
        load_teacher("t", make(tmp_path, {}))
    assert "\n" not in str(error.value)
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    with pytest.raises(TeacherError, match=r"cannot load .*: KeyError: 'added_tokens'"):
        load_teacher_tokenizer("t", make(tmp_path, {}).teachers["t"])


@pytest.mark.parametrize("vocab_size", [4, 6, 9, 10, 12, 17])
def test_a_vocabulary_of_few_tokens_is_enough(vocab_size: int) -> None:
    model = tiny_model("llama", **{**B, "vocab_size": vocab_size})
    verified = fit_adapter("t", model, None)
    assert (verified.kind, verified.batches.padded_to) == ("decoder", None)


@pytest.mark.parametrize(
    ("leak", "outcome"),
    [
        (lambda hidden: hidden + hidden.mean(0), (0, True)),
        (lambda hidden: hidden + torch.randn_like(hidden), "differ from one pass to the next"),
    ],
    ids=["expert capacity of a batch", "random hashes"],
)
def test_texts_that_change_one_another_at_any_length_are_read_alone(
    leak: Any, outcome: Any
) -> None:
    """As experts of a capacity that a batch shares would, and hashing of tokens into buckets."""
    model = tiny_model("bert", **{**ENCODERS["bert"][1], "initializer_range": 0.3})
    middle = model.encoder.layer[1]
    middle.register_forward_pre_hook(lambda module, args: (leak(args[0]), *args[1:]))
    if isinstance(outcome, str):
        with pytest.raises(TeacherError, match=outcome):
            fit_adapter("t", model, None)
        return
    batches = fit_adapter("t", model, None).batches
    assert (batches.padded_to, batches.alone) == outcome
    assert list(batch_by_tokens([3, 3, 2], 1)) == [[0], [1], [2]]
