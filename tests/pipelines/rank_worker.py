"""One rank of a training run under torchrun: trains, and writes down which texts it counted.

torchrun … rank_worker.py CONFIG OUTPUT STOP_STEP [fsdp | nan]

``fsdp`` shards the student; ``nan`` breaks the loss of rank 1 in step 2.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from kvdistill.config.load import load_experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.distill.train import checkpoint as checkpoint_files
from kvdistill.errors import NonFiniteError
from kvdistill.pipelines.run_folder import begin
from kvdistill.pipelines.train import build_trainer
from kvdistill.store.reader import KVStore


class StopAt(TrainerCallback):
    """Ends training after a step; its checkpoint is there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def shard_on_cpus() -> None:
    """What `accelerate launch` sets for examples/accelerate/fsdp.yaml, on CPUs.

    accelerate shards on accelerators alone; these processes are taken for such.
    """
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }
    state: Any = PartialState
    state._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    state.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    torch.distributed.init_process_group("gloo")


def main(config: str, output: str, stop_step: str, flag: str = "") -> None:
    if flag == "fsdp":
        shard_on_cpus()
    experiment = load_experiment(Path(config))
    folder = begin(experiment)
    trainer = build_trainer(
        experiment, KVStore.open(experiment.store), load_corpus(experiment.corpus), folder
    )
    rank = os.environ.get("RANK", "0")
    seen: list[list[int]] = []
    counted: list[dict[str, float]] = []
    compute = trainer.compute_loss

    def recorded(model: Any, inputs: Any, num_items_in_batch: Any, **rest: Any) -> Any:
        rows = (inputs[name] for name in ("input_ids", "labels", "text_mask"))
        for ids, labels, mask in zip(*rows, strict=True):
            if (labels != -100).any():
                seen.append(ids[mask].tolist())
        counts = {name: num_items_in_batch[name].item() for name in num_items_in_batch}
        if not counted or counts != counted[-1]:
            counted.append(counts)
        if flag == "nan" and rank == "1" and trainer.state.global_step == 1:
            num_items_in_batch = {n: num_items_in_batch[n] * torch.nan for n in num_items_in_batch}
        return compute(model, inputs, num_items_in_batch=num_items_in_batch, **rest)

    if rank == "1":  # safetensors promises no order
        load = checkpoint_files.load
        checkpoint_files.load = lambda data: dict(reversed(load(data).items()))
    trainer.compute_loss = recorded
    trainer.add_callback(StopAt(int(stop_step)))
    checkpoint = folder.checkpoint()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except NonFiniteError as error:
        Path(output, f"error-{rank}.txt").write_text(str(error), encoding="utf-8")
        time.sleep(2)  # torchrun ends all ranks when one fails
        raise
    metrics = trainer.evaluate()
    trainer.save_model(str(folder.student))
    tokenizer = trainer.processing_class
    texts = [tokenizer.decode(ids) for ids in seen]
    found = {
        "texts": texts, "counts": counted, "metrics": metrics,
        "scores": trainer.held_out.rows,
        "step": trainer.state.global_step, "of": trainer.state.max_steps,
        "sharded": any(isinstance(p, DTensor) for p in trainer.model.parameters()),
    }  # fmt: skip
    Path(output, f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
