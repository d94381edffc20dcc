"""Tiny latent students, padded batches, and thinking the slow way: no cache, no padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvdistill.config.distill import LatentConfig
from kvdistill.distill.student.latent.model import LatentStudent

LLAMA = (
    "llama",
    {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
)  # fmt: skip


def thinker(family: tuple[str, dict[str, Any]] = LLAMA, **settings: Any) -> LatentStudent:
    """A student with random weights, which depend on nothing but the family."""
    torch.manual_seed(0)
    model_type, architecture = family
    given = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **architecture}
    backbone = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given))
    student = LatentStudent(backbone, LatentConfig(**{"projector_width": 16, **settings}))
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)  # norms and biases are not 1 and 0
    return student.eval()


def like(student: LatentStudent, **settings: Any) -> LatentStudent:
    """The same weights under other settings; what the other has no use for is left out."""
    other = LatentStudent(
        student.backbone, LatentConfig(**{**student.config.model_dump(), **settings})
    )
    wanted = other.state_dict()
    other.load_state_dict({k: v for k, v in student.state_dict().items() if k in wanted})
    return other.eval()


def batch(num_answers: int = 3) -> dict[str, Tensor]:
    """Questions of 6, 2 and 4 tokens, answers of 3, 1 and 2."""
    generator = torch.Generator().manual_seed(1)
    question = torch.randint(3, 40, (3, 6), generator=generator)
    question_mask = torch.tensor([[1] * 6, [0] * 4 + [1] * 2, [0] * 2 + [1] * 4])
    answer = torch.randint(3, 40, (3, num_answers), generator=generator)
    answer_mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])[:, :num_answers]
    return {
        "question_BT": question * question_mask,
        "question_mask_BT": question_mask,
        "answer_BA": answer * answer_mask,
        "answer_mask_BA": answer_mask,
    }


def rows(given: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every sample of a batch alone, without its padding."""
    alone = []
    for i in range(len(given["question_BT"])):
        asked, said = given["question_mask_BT"][i].bool(), given["answer_mask_BA"][i].bool()
        alone.append(
            {
                "question_BT": given["question_BT"][i : i + 1, asked],
                "question_mask_BT": given["question_mask_BT"][i : i + 1, asked],
                "answer_BA": given["answer_BA"][i : i + 1, said],
                "answer_mask_BA": given["answer_mask_BA"][i : i + 1, said],
            }
        )
    return alone


def slow(student: LatentStudent, one: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits at eot and answer ``[1 + A, V]`` and latents ``[M, E]`` of one sample."""
    embed, config = student.get_input_embeddings(), student.config
    question = torch.cat([embed(one["question_BT"]), student.bot_E[None, None]], 1)
    tail = torch.cat([student.eot_E[None, None], embed(one["answer_BA"])], 1)

    def run(*parts: Tensor) -> Any:
        return student.backbone(
            inputs_embeds=torch.cat(parts, 1), use_cache=False, output_hidden_states=True
        )

    def hidden(*parts: Tensor) -> Tensor:
        return run(*parts).hidden_states[-1]

    num = question.shape[1]
    x = student.latents_ME[None]
    if config.method == "codi":
        x = torch.zeros(1, 0, question.shape[2])
        for _ in range(config.num_latents):
            x = torch.cat([x, student.projector(hidden(question, x)[:, -1:])], 1)
    elif config.method == "pccot" and config.iterations:
        x = student.projector(hidden(question, x)[:, num - 1 : -1])
        for _ in range(config.iterations - 1):
            x = torch.cat([x[:, :1], student.projector(hidden(question, x)[:, num:-1])], 1)
    output = run(question, x, tail)
    stop = num + x.shape[1]
    return output.logits[0, stop:], output.hidden_states[-1][0, num:stop]
