"""Teachers whose layers lie inside a larger model, and teachers with quantised weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from kvdistill.attention.hooks import capture
from kvdistill.errors import TeacherError
from kvdistill.extract.extract_shard import extract_samples
from kvdistill.extract.loading import text_model_of, weights_fingerprint
from kvdistill.extract.teacher import load_teacher
from tests.attention.families import MULTIMODAL
from tests.attention.test_families import SAMPLES
from tests.extract.models import save_teacher, tiny_tokenizer
from tests.pipelines.test_teachers import make


def save_multimodal(folder: Path, model_type: str) -> Any:
    """A tiny model of images and text with its tokenizer, in a folder; and the model."""
    options = MULTIMODAL[model_type]
    tokenizer = tiny_tokenizer()
    options = {**options, "text_config": {**options["text_config"], "vocab_size": len(tokenizer)}}
    torch.manual_seed(0)
    architecture = AutoConfig.for_model(model_type, **options)
    whole = transformers.AutoModelForImageTextToText.from_config(architecture).eval()
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return whole


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_the_language_model_inside_a_multimodal_teacher_is_read(
    tmp_path: Path, model_type: str
) -> None:
    whole = save_multimodal(tmp_path / "t", model_type)
    teacher = load_teacher("t", make(tmp_path, {}, long_text="truncate"))
    assert "vision" not in " ".join(name for name, _ in teacher.model.named_modules())
    ids = torch.arange(3, 16)[None]
    found: dict[int, Tensor] = {}
    with capture(teacher.sites, lambda layer_idx, qkv: found.update({layer_idx: qkv.value})):
        teacher.model(ids)
    with torch.no_grad():
        cache = whole(input_ids=ids, use_cache=True).past_key_values
    assert len(found) == teacher.model.config.num_hidden_layers
    for layer_idx, value in found.items():
        own = cache.layers[layer_idx].values
        torch.testing.assert_close(value[:, :, -own.shape[2] :], own, rtol=1e-5, atol=1e-6)
    shard = extract_samples(teacher, SAMPLES, batch_tokens=4096).shard
    assert all((array != 0).any() for name, array in shard.arrays.items() if "value" in name)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_vl"])
def test_a_multimodal_teacher_generates(tmp_path: Path, model_type: str) -> None:
    save_multimodal(tmp_path / "t", model_type)
    teacher = load_teacher("t", make(tmp_path, {"generate": {"max_new_tokens": 4}}))
    assert teacher.causal_lm.can_generate()
    assert teacher.model is text_model_of("t", teacher.causal_lm)


def test_a_language_model_that_reads_otherwise_than_the_whole_is_refused() -> None:
    whole = AutoModel.from_config(AutoConfig.for_model("llava", **MULTIMODAL["llava"])).eval()
    whole.register_forward_hook(
        lambda module, args, output: output | {"hidden_states": (output.hidden_states[-1] * 1.1,)}
    )
    with pytest.raises(TeacherError, match="LlamaModel inside LlavaModel reads text otherwise"):
        text_model_of("t", whole)
    whole.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(TeacherError, match="cannot be read on text alone: ZeroDivisionError"):
        text_model_of("t", whole)


METHODS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"load_in_4bit": True},
    "gptq": {"bits": 4, "group_size": 32},
    "awq": {"bits": 4, "group_size": 32},
    "compressed-tensors": {"config_groups": {}, "format": "int-quantized"},
    "hqq": {"quant_config": {}},
    "quanto": {"weights": "int8"},
    "aqlm": {},
    "fbgemm_fp8": {},
    "fp_quant": {},
    "torchao": {"quant_type": {"default": "int8_weight_only"}},
}


def quantised_folder(folder: Path, method: str, options: dict[str, Any]) -> None:
    save_teacher(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": method, **options}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights_that_cannot_be_loaded_are_refused_in_one_line(
    tmp_path: Path, method: str
) -> None:
    """Packages are missing, or where they are not, the weights are not what the config states."""
    quantised_folder(tmp_path / "t", method, METHODS[method])
    with pytest.raises(TeacherError) as caught:
        load_teacher("t", make(tmp_path, {}))
    message = str(caught.value)
    assert "\n" not in message
    if "cannot load" in message:
        assert method.partition("_")[0] in message.lower()
    else:
        assert "are missing" in message


def test_fp8_weights_are_read(tmp_path: Path) -> None:
    """Blocks with a scale each; without a GPU they are dequantised while loading."""
    quantised_folder(
        tmp_path / "t", "fp8", {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    )
    plain = load_file(tmp_path / "t" / "model.safetensors")
    packed, rounded = {}, {}
    for name, weight in plain.items():
        packed[name] = rounded[name] = weight
        if "proj" in name:
            scale = weight.abs().max() / 448
            codes = (weight / scale).to(torch.float8_e4m3fn)
            packed[name], rounded[name] = codes, codes.float() * scale
            packed[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(packed, tmp_path / "t" / "model.safetensors", metadata={"format": "pt"})
    teacher = load_teacher("t", make(tmp_path, {}, long_text="truncate"))
    own = dict(teacher.model.named_parameters())
    for name, weight in rounded.items():
        torch.testing.assert_close(own[name].float(), weight, rtol=1e-2, atol=1e-4)
    shard = extract_samples(teacher, SAMPLES, batch_tokens=4096).shard
    assert (shard.arrays["key"] != 0).any()
    assert teacher.manifest.weights_fingerprint.startswith("xxh3:")


class Packed(torch.nn.Module):
    """Quantised as GPTQ does it (buffers), with a scalar and eight bits of float."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), False)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.register_buffer("qweight", torch.arange(6, dtype=torch.int32).reshape(2, 3))


@pytest.mark.parametrize("part", ["weight", "scale", "qweight"])
def test_a_fingerprint_covers_every_quantised_part(part: str) -> None:
    model = Packed()
    before = weights_fingerprint(model, quantised=True)
    assert before == weights_fingerprint(Packed(), quantised=True)
    changed = getattr(model, part).data
    changed.copy_(changed.float() * 2 + 1)
    assert weights_fingerprint(model, quantised=True) != before


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_bitsandbytes_quantised_are_read(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    save_teacher(tmp_path / "plain", hidden_size=64, intermediate_size=128)
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModel.from_pretrained(
        tmp_path / "plain", quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "t")
    tiny_tokenizer().save_pretrained(tmp_path / "t")
    teachers = [load_teacher("t", make(tmp_path, {}, long_text="truncate")) for _ in range(2)]
    fingerprints = {teacher.manifest.weights_fingerprint for teacher in teachers}
    assert len(fingerprints) == 1
    shard = extract_samples(teachers[0], SAMPLES, batch_tokens=4096).shard
    assert (shard.arrays["key"] != 0).any()
