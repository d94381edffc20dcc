"""One rank of a training run under torchrun: trains, and writes down which texts it counted.

torchrun … rank_worker.py CONFIG OUTPUT STOP_STEP
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from kvdistill.config.load import load_experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.pipelines.run_folder import begin
from kvdistill.pipelines.train import build_trainer
from kvdistill.store.reader import KVStore


class StopAt(TrainerCallback):
    """Ends training after a step; its checkpoint is there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def main(config: str, output: str, stop_step: str) -> None:
    experiment = load_experiment(Path(config))
    folder = begin(experiment)
    trainer = build_trainer(
        experiment, KVStore.open(experiment.store), load_corpus(experiment.corpus), folder
    )
    seen: list[list[int]] = []
    compute = trainer.compute_loss

    def recorded(model: Any, inputs: Any, **rest: Any) -> Any:
        rows = (inputs[name] for name in ("input_ids", "labels", "text_mask"))
        for ids, labels, mask in zip(*rows, strict=True):
            if (labels != -100).any():
                seen.append(ids[mask].tolist())
        return compute(model, inputs, **rest)

    trainer.compute_loss = recorded
    trainer.add_callback(StopAt(int(stop_step)))
    checkpoint = folder.checkpoint()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    tokenizer = trainer.processing_class
    texts = [tokenizer.decode(ids) for ids in seen]
    rank = os.environ.get("RANK", "0")
    found = {"texts": texts, "step": trainer.state.global_step, "of": trainer.state.max_steps}
    Path(output, f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
