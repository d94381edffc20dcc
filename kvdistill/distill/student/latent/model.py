"""``LatentStudent``: a Hugging Face causal LM with latent positions between question and answer.

The language model is saved as an ordinary folder, which ``AutoModelForCausalLM`` loads. What
latents need (their initial inputs, the marks bot and eot, the projector) is saved beside it. The
marks are embeddings, not tokens, so the tokenizer does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvdistill.attention.geometry import position_limit
from kvdistill.attention.language_head import DeferredLogits, LanguageHead
from kvdistill.attention.padded_generation import pad_left, through_first
from kvdistill.config.distill import LatentConfig
from kvdistill.distill.student.build import load_causal_lm, one_line_errors, prompt_ids
from kvdistill.distill.student.latent.iteration import (
    LatentProjector,
    Prefix,
    conclude,
    jacobi,
    sequential,
)
from kvdistill.errors import StudentError

LATENT_FILE: Final = "latent.safetensors"
SETTINGS_FILE: Final = "latent.json"
BACKBONE_PREFIX: Final = "backbone."


@dataclass(frozen=True, eq=False)
class Thought:
    """The last pass of a latent student: over latents, eot and (in training) the answer."""

    output: Any
    """The language model's, with hidden states."""
    answer_logits: Tensor | DeferredLogits
    """``[B, 1 + A, V]``: column 0, at eot, predicts the answer's first token."""
    cache: DynamicCache
    mask_BT: Tensor
    """Long; covers all positions of the cache."""
    num_latents: int
    num_tail: int

    @property
    def cue(self) -> Tensor:
        """``[B, L, E]``: every layer's output at eot, the last after the final norm."""
        layers = [h[:, -self.num_tail] for h in self.output.hidden_states[1:]]
        return torch.stack(layers, 1)

    @property
    def latents(self) -> Tensor:
        """``[B, M, E]``: last hidden states of the latent positions, after the final norm."""
        hidden: Tensor = self.output.hidden_states[-1][:, self.columns]
        return hidden

    @property
    def columns(self) -> slice:
        """The latents' columns in the last pass."""
        return slice(-self.num_tail - self.num_latents, -self.num_tail)


class LatentStudent(nn.Module):
    """A causal LM that reads a question, reasons in latent positions and then answers."""

    def __init__(self, backbone: Any, config: LatentConfig) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        plain = {DynamicLayer, DynamicSlidingWindowLayer}
        kinds = {type(layer) for layer in DynamicCache(config=backbone.config).layers}
        if kinds - plain:
            raise StudentError(
                f"latent: a student of type {backbone.config.model_type!r} has layers that do not "
                f"keep keys and values alone ({(kinds - plain).pop().__name__}), and cannot go "
                "back to the end of the question; choose one whose layers are all attention"
            )
        table = backbone.get_input_embeddings().weight.detach()
        scale, size = float(table.float().std()), int(table.shape[1])
        like = {"device": table.device, "dtype": table.dtype}
        self.bot_E = nn.Parameter(torch.randn(size, **like) * scale)
        self.eot_E = nn.Parameter(torch.randn(size, **like) * scale)
        self.latents_ME = nn.Parameter(torch.randn(config.positions, size, **like) * scale)
        self.language_head = LanguageHead(backbone)
        self.projector: LatentProjector | None = None
        if config.method == "codi" or (config.method == "pccot" and config.iterations):
            self.projector = LatentProjector(
                size, config.projector_width, config.dropout, scale
            ).to(**like)

    def get_input_embeddings(self) -> Any:
        """The language model's."""
        return self.backbone.get_input_embeddings()

    @property
    def num_passes(self) -> int:
        """Forward passes up to and including the one that gives the answer's first token."""
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
        """Run the latents, and the answer if given (teacher forcing).

        Questions are left-padded token ids, answers right-padded; masks are 0 on padding.
        """
        prefix, x_BME = self.think(question_BT, question_mask_BT)
        return self.conclude(prefix, x_BME, answer_BA, answer_mask_BA)

    def think(self, question_BT: Tensor, question_mask_BT: Tensor) -> tuple[Prefix, Tensor]:
        """The prefix with its cache, and the inputs ``[B, M, E]`` of the latent positions."""
        embeds = self.get_input_embeddings()(question_BT)
        bot = self.bot_E.expand(embeds.shape[0], 1, -1).to(embeds.dtype)
        mask = torch.cat([question_mask_BT.long(), question_mask_BT.new_ones(len(bot), 1)], 1)
        prefix = Prefix(torch.cat([embeds, bot], 1), mask.long())
        if self.config.method == "codi" and self.projector is not None:
            return sequential(self.backbone, self.projector, prefix, self.config.num_latents)
        x_BME = self.latents_ME.to(embeds.dtype).expand(len(embeds), -1, -1)
        if self.projector is None:
            return prefix, x_BME
        return jacobi(self.backbone, self.projector, prefix, x_BME, self.config.iterations)

    def conclude(
        self,
        prefix: Prefix,
        x_BME: Tensor,
        answer_BA: Tensor | None = None,
        answer_mask_BA: Tensor | None = None,
    ) -> Thought:
        """Run the latents for the last time, followed by eot and the answer."""
        tail = self.eot_E.expand(x_BME.shape[0], 1, -1).to(x_BME.dtype)
        mask = torch.ones(tail.shape[:2], dtype=torch.long, device=tail.device)
        if answer_BA is not None:
            tail = torch.cat([tail, self.get_input_embeddings()(answer_BA)], 1)
            given = torch.ones_like(answer_BA) if answer_mask_BA is None else answer_mask_BA.long()
            mask = torch.cat([mask, given], 1)
        found = conclude(self.language_head, prefix, x_BME, tail, mask)
        return Thought(*found, x_BME.shape[1], tail.shape[1])

    def generate(
        self, tokenizer: Any, questions: Sequence[str], max_new_tokens: int | None = None
    ) -> list[str]:
        """Greedy answers to questions, as text without special tokens."""
        found = answer(self, tokenizer, questions, max_new_tokens or self.config.max_new_tokens)
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the language model as an ordinary folder, and the latents' weights beside it."""
        folder = Path(folder)
        state = self.state_dict() if state_dict is None else state_dict
        backbone, latent = split_state(state, BACKBONE_PREFIX)
        self.backbone.save_pretrained(folder, state_dict=backbone)
        save_file(latent, folder / LATENT_FILE)
        (folder / SETTINGS_FILE).write_text(self.config.model_dump_json(indent=1), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> LatentStudent:
        """Load what ``save_pretrained`` wrote; ``options`` go to ``AutoModelForCausalLM``.

        Raises:
            StudentError: the folder holds no latent student, or cannot be loaded.
        """
        folder = Path(folder)
        if not is_latent(folder):
            raise StudentError(
                f"{folder} holds no latent student (it has no {SETTINGS_FILE}); give the `student` "
                "folder of a run with a `latent` section"
            )
        with one_line_errors(f"load the latent student {folder}", str(folder)):
            config = LatentConfig.model_validate_json((folder / SETTINGS_FILE).read_bytes())
            student = cls(load_causal_lm(folder, **options), config)
            found = student.load_state_dict(load((folder / LATENT_FILE).read_bytes()), strict=False)
        missing = [name for name in found.missing_keys if not name.startswith(BACKBONE_PREFIX)]
        if missing or found.unexpected_keys:
            raise StudentError(
                f"{folder / LATENT_FILE} does not belong to the {SETTINGS_FILE} beside it: missing "
                f"{missing}, unexpected {found.unexpected_keys}; copy both from one run"
            )
        return student.eval()


def split_state(
    state: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The entries under ``prefix``, without it, and all others, contiguous."""
    inside = {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}
    outside = {k: x.contiguous() for k, x in state.items() if not k.startswith(prefix)}
    return inside, outside


def is_latent(folder: Path) -> bool:
    """Whether a folder holds a latent student."""
    return (folder / SETTINGS_FILE).is_file()


Think = Callable[[Tensor, Tensor], Thought]
"""From ``(question_BT, question_mask_BT)`` to a thought, as ``LatentStudent.forward``."""


@torch.inference_mode()
def answer(
    student: LatentStudent,
    tokenizer: Any,
    questions: Sequence[str],
    max_new_tokens: int,
    think: Think | None = None,
) -> list[list[int]]:
    """Generate greedy answers to one batch of questions, from the cache that the latents leave.

    ``think`` replaces the student's forward pass, such as one with tampered latents.

    Returns:
        Token ids of every answer, up to and including its first EOS token.

    Raises:
        StudentError: ``max_new_tokens`` is less than 1, or leaves no position for a question.
    """
    if max_new_tokens < 1:
        raise StudentError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not questions:
        return []
    room = question_room(student.backbone, student.config, max_new_tokens)
    was_training = student.training
    student.eval()
    device = student.get_input_embeddings().weight.device
    ids, mask = left_padded(tokenizer, questions)
    kept = slice(None if room is None else -room, None)  # questions are left-padded
    ids, mask = ids[:, kept], mask[:, kept]
    thought = (think or student)(ids.to(device), mask.to(device))
    generated = _continue_greedily(student, thought, max_new_tokens, tokenizer.eos_token_id)
    student.train(was_training)
    return generated


def question_room(backbone: Any, config: LatentConfig, max_new_tokens: int) -> int | None:
    """Last tokens of a question that fit beside latents and answer; None where all do.

    Raises:
        StudentError: none.
    """
    positions = position_limit(backbone)
    if positions is None:
        return None
    room = positions - config.positions - 2 - max_new_tokens  # bot and eot
    if room < 1:
        raise StudentError(
            f"max_new_tokens: the student's {positions} positions hold no question beside "
            f"{config.positions} latents and {max_new_tokens} tokens; generate fewer"
        )
    return room


def left_padded(tokenizer: Any, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """``BOS question`` of every text, left-padded: ids and mask, ``[B, T]`` long."""
    return pad_left(prompt_ids(tokenizer, questions), tokenizer.pad_token_id or 0)


def _continue_greedily(
    student: LatentStudent, thought: Thought, max_new_tokens: int, eos_id: int | None
) -> list[list[int]]:
    end = -1 if eos_id is None else eos_id
    mask = thought.mask_BT
    logits = thought.answer_logits
    whole = logits if isinstance(logits, Tensor) else logits.whole()
    token_B = whole[:, 0].argmax(-1)
    generated, done = [token_B], token_B == end
    while len(generated) < max_new_tokens and not bool(done.all()):
        mask = F.pad(mask, (0, 1), value=1)
        output = student.backbone(
            input_ids=token_B[:, None],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1)[:, -1:],
            past_key_values=thought.cache,
            use_cache=True,
        )
        token_B = output.logits[:, -1].argmax(-1)
        generated.append(token_B)
        done = done | (token_B == end)
    return [through_first(row, [end]) for row in torch.stack(generated, 1).tolist()]
