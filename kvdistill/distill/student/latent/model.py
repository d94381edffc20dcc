"""``LatentStudent``: any Hugging Face causal LM, with latent positions between question and answer.

The language model stays an ordinary one, in an ordinary folder that ``AutoModelForCausalLM``
loads; what latents need (their first inputs, two marks, the projector) is three tensors and a
small network of its own, saved beside it. The marks are embeddings, not tokens, so the tokenizer
does not change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvdistill.attention.padded_generation import pad_left, through_first
from kvdistill.config.distill import LatentConfig
from kvdistill.distill.student.latent.iteration import (
    LatentPass,
    LatentProjector,
    Prefix,
    conclude,
    jacobi,
    pause,
    sequential,
)
from kvdistill.errors import StudentError

LATENT_FILE: Final = "latent.safetensors"


SETTINGS: Final = "latent.json"


BACKBONE: Final = "backbone."


@dataclass(frozen=True, eq=False)
class Thought:
    """What thinking came to: the pass over latents, eot and (in training) the answer."""

    run: LatentPass
    mask_BT: Tensor
    """Long; everything that the cache holds."""
    num_latents: int
    num_tail: int

    @property
    def answer_logits(self) -> Tensor:
        """``[B, 1 + A, V]``: column 0, at eot, predicts the answer's first token."""
        logits: Tensor = self.run.output.logits[:, -self.num_tail :]
        return logits

    @property
    def cue(self) -> Tensor:
        """``[B, L, E]``: every layer's output at eot, the last after the final norm."""
        layers = [h[:, -self.num_tail] for h in self.run.output.hidden_states[1:]]
        return torch.stack(layers, 1)

    @property
    def latents(self) -> Tensor:
        """``[B, M, E]``: last hidden states of the latent positions."""
        return self.run.last_hidden[:, self.columns]

    @property
    def columns(self) -> slice:
        """Where the latents are among the columns of the last pass."""
        return slice(-self.num_tail - self.num_latents, -self.num_tail)


class LatentStudent(nn.Module):
    """A causal LM that reads a question, thinks in latent positions and then answers."""

    def __init__(self, backbone: Any, config: LatentConfig) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        table = backbone.get_input_embeddings().weight.detach()
        scale, size = float(table.float().std()), int(table.shape[1])
        like = {"device": table.device, "dtype": table.dtype}
        self.bot_E = nn.Parameter(torch.randn(size, **like) * scale)
        self.eot_E = nn.Parameter(torch.randn(size, **like) * scale)
        self.latents_ME = nn.Parameter(torch.randn(config.positions, size, **like) * scale)
        self.projector: LatentProjector | None = None
        if config.method == "codi" or (config.method == "pccot" and config.iterations):
            self.projector = LatentProjector(
                size, config.projector_width, config.dropout, scale
            ).to(**like)

    def get_input_embeddings(self) -> Any:
        """The language model's own."""
        return self.backbone.get_input_embeddings()

    @property
    def num_passes(self) -> int:
        """Forward passes up to the one that gives the answer's first token, which is counted."""
        if self.config.method == "codi":
            return 1 + self.config.num_latents
        return 1 + (self.config.iterations if self.config.method == "pccot" else 0)

    def forward(
        self,
        question_BT: Tensor,
        question_mask_BT: Tensor,
        answer_BA: Tensor | None = None,
        answer_mask_BA: Tensor | None = None,
    ) -> Thought:
        """Think, and read the answer where there is one.

        Args:
            question_BT: token ids, padded on the left.
            question_mask_BT: 1 where a token counts.
            answer_BA: token ids of the answer, padded on the right.
            answer_mask_BA: 1 where a token counts.
        """
        prefix, x_BME = self.think(question_BT, question_mask_BT)
        return self.conclude(prefix, x_BME, answer_BA, answer_mask_BA)

    def think(self, question_BT: Tensor, question_mask_BT: Tensor) -> tuple[Prefix, Tensor]:
        """The question's cache, and the inputs ``[B, M, E]`` of the latent positions."""
        embeds = self.get_input_embeddings()(question_BT)
        bot = self.bot_E.expand(embeds.shape[0], 1, -1).to(embeds.dtype)
        mask = torch.cat([question_mask_BT.long(), question_mask_BT.new_ones(len(bot), 1)], 1)
        prefix = Prefix(torch.cat([embeds, bot], 1), mask.long())
        latents = self.latents_ME.to(embeds.dtype)
        if self.projector is None:
            return pause(prefix, latents)
        if self.config.method == "codi":
            return sequential(self.backbone, self.projector, prefix, self.config.num_latents)
        return jacobi(self.backbone, self.projector, prefix, latents, self.config.iterations)

    def conclude(
        self,
        prefix: Prefix,
        x_BME: Tensor,
        answer_BA: Tensor | None = None,
        answer_mask_BA: Tensor | None = None,
    ) -> Thought:
        """The last run of the latents, with eot and the answer behind them."""
        tail = self.eot_E.expand(x_BME.shape[0], 1, -1).to(x_BME.dtype)
        mask = torch.ones(tail.shape[:2], dtype=torch.long, device=tail.device)
        if answer_BA is not None:
            tail = torch.cat([tail, self.get_input_embeddings()(answer_BA)], 1)
            given = torch.ones_like(answer_BA) if answer_mask_BA is None else answer_mask_BA.long()
            mask = torch.cat([mask, given], 1)
        found, all_mask = conclude(self.backbone, prefix, x_BME, tail, mask)
        return Thought(found, all_mask, x_BME.shape[1], tail.shape[1])

    def generate(
        self, tokenizer: Any, questions: Sequence[str], max_new_tokens: int | None = None
    ) -> list[str]:
        """Answers to questions, greedily: what follows the thinking, without special tokens."""
        found = answer(self, tokenizer, questions, max_new_tokens or self.config.max_new_tokens)
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """The language model as an ordinary folder, what latents need beside it."""
        folder = Path(folder)
        state = self.state_dict() if state_dict is None else state_dict
        backbone = {k.removeprefix(BACKBONE): v for k, v in state.items() if k.startswith(BACKBONE)}
        rest = {k: v.contiguous() for k, v in state.items() if not k.startswith(BACKBONE)}
        self.backbone.save_pretrained(folder, state_dict=backbone)
        save_file(rest, folder / LATENT_FILE)
        (folder / SETTINGS).write_text(self.config.model_dump_json(indent=1), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> LatentStudent:
        """Load what ``save_pretrained`` wrote; ``options`` go to ``AutoModelForCausalLM``.

        Raises:
            StudentError: the folder holds no latent student.
        """
        from transformers import AutoModelForCausalLM

        folder = Path(folder)
        if not is_latent(folder):
            raise StudentError(
                f"{folder} holds no latent student (it has no {SETTINGS}); give the `student` "
                "folder of a run with a `latent` section"
            )
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        backbone = AutoModelForCausalLM.from_pretrained(folder, **options)
        student = cls(backbone, LatentConfig.model_validate(settings))
        found = student.load_state_dict(load_file(folder / LATENT_FILE), strict=False)
        missing = [name for name in found.missing_keys if not name.startswith(BACKBONE)]
        if missing or found.unexpected_keys:
            raise StudentError(
                f"{folder / LATENT_FILE} does not belong to the {SETTINGS} beside it: missing "
                f"{missing}, unexpected {found.unexpected_keys}; copy both from one run"
            )
        return student.eval()


def is_latent(folder: Path) -> bool:
    """Whether a folder holds a latent student."""
    return (folder / SETTINGS).is_file()


Think = Callable[[Tensor, Tensor], Thought]


@torch.inference_mode()
def answer(
    student: LatentStudent,
    tokenizer: Any,
    questions: Sequence[str],
    max_new_tokens: int,
    think: Think | None = None,
) -> list[list[int]]:
    """Token ids of an answer to every question, its end-of-text token included.

    Args:
        student: on any device.
        tokenizer: its own.
        questions: texts; one batch.
        max_new_tokens: room for an answer.
        think: how to get from ``(question_BT, mask_BT)`` to a thought; the student's own way if
            not given (diagnostics tamper with it).

    Raises:
        StudentError: no room for an answer.
    """
    if max_new_tokens < 1:
        raise StudentError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not questions:
        return []
    was_training = student.training
    student.eval()
    device = student.get_input_embeddings().weight.device
    ids, mask = left_padded(tokenizer, questions)
    thought = (think or student)(ids.to(device), mask.to(device))
    written = _greedy(student, thought, max_new_tokens, tokenizer.eos_token_id)
    student.train(was_training)
    return written


def left_padded(tokenizer: Any, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """``BOS question`` of every text, padded on the left: ids and mask, ``[B, T]`` long."""
    encoded = tokenizer(
        list(questions), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return pad_left([before + row for row in encoded["input_ids"]], tokenizer.pad_token_id or 0)


def _greedy(
    student: LatentStudent, thought: Thought, max_new_tokens: int, eos_id: int | None
) -> list[list[int]]:
    cache, mask = thought.run.cache, thought.mask_BT
    token_B = thought.answer_logits[:, 0].argmax(-1)
    written = [token_B]
    done = token_B == eos_id if eos_id is not None else torch.zeros_like(token_B, dtype=torch.bool)
    while len(written) < max_new_tokens and not bool(done.all()):
        mask = F.pad(mask, (0, 1), value=1)
        output = student.backbone(
            input_ids=token_B[:, None],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
        token_B = output.logits[:, -1].argmax(-1)
        written.append(token_B)
        if eos_id is not None:
            done = done | (token_B == eos_id)
    rows = torch.stack(written, 1).tolist()
    return [through_first(row, [eos_id]) for row in rows]


# MERGED-DOC distill.latent.generation
# Answers of a latent student: think, then write greedily from the cache that thinking left.
