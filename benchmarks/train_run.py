"""One measured training run in a process of its own, started by ``benchmarks/train.py``.

    python benchmarks/train_run.py '{"what": "train", "experiment": {…}, "live": false}'

Prints one JSON line: seconds, waits and peak memory of this process.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """A whole run without saving: seconds of every step, and of waiting for its batches."""
    from kvdistill.config.load import parse_experiment
    from kvdistill.corpus.readers import load_corpus
    from kvdistill.pipelines.run_folder import begin
    from kvdistill.pipelines.train import build_trainer
    from kvdistill.store.reader import KVStore

    source = "live" if spec["live"] else "store"
    experiment = parse_experiment({**spec["experiment"], "kv_source": source})
    trainer = build_trainer(
        experiment,
        KVStore.open(experiment.store),
        load_corpus(experiment.corpus),
        begin(experiment),
    )
    waits: list[float] = []
    trainer.get_batch_samples = timed(trainer.get_batch_samples, waits)
    ready, used = time.perf_counter(), time.process_time()
    trainer.train()
    ended = time.perf_counter()
    return {
        "setup_s": ready - STARTED,
        "setup_wall_s": ready - STARTED,
        "setup_cpu_s": used,
        "train_s": ended - ready,
        "waits_s": waits,
        "steps": trainer.state.global_step,
        "loss": trainer.state.log_history[0].get("loss"),
    }


def timed(
    work: Callable[..., Any], seconds: list[float], clock: Callable[[], float] = time.perf_counter
) -> Callable[..., Any]:
    def measured(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        result = work(*args, **kwargs)
        seconds.append(clock() - started)
        return result

    return measured


def extract(spec: dict[str, Any]) -> dict[str, Any]:
    """Stage 1 of an experiment, including loading of the teachers."""
    from kvdistill.config.load import parse_experiment
    from kvdistill.pipelines import extract as stage

    loading: list[float] = []
    stage.open_teacher = timed(stage.open_teacher, loading, time.process_time)
    used = time.process_time()
    report = stage.extract(parse_experiment(spec["experiment"]))
    seconds, reading = time.perf_counter() - STARTED, sum(x.seconds for x in report.teachers)
    return {
        "extract_s": seconds,
        "reading_s": reading,
        "setup_wall_s": seconds - reading,
        "setup_cpu_s": used + sum(loading),
        "tokens": {teacher.teacher: teacher.tokens for teacher in report.teachers},
    }


def synthesise(spec: dict[str, Any]) -> dict[str, Any]:
    """A store of random int8 codes: ``num_shards`` shards of 16 texts of 200 tokens, 13 MB each."""
    import numpy as np
    import torch

    from kvdistill.corpus.samples import Sample, Shard
    from kvdistill.distill.student.build import train_tokenizer
    from kvdistill.store.channel_statistics import ChannelStatistics
    from kvdistill.store.codecs import CODECS
    from kvdistill.store.codecs.parts import part_name
    from kvdistill.store.manifest import TeacherManifest
    from kvdistill.store.shard import EncodedShard, TokenTable
    from kvdistill.store.writer import add_teacher, create, publish_shard
    from kvdistill.types import KINDS

    per_shard, num_tokens, lead, dim = 16, 200, (8, 4), 64
    text = " ".join(str(i * 7919 % 1000) for i in range(4 * num_tokens))[: 4 * num_tokens]
    train_tokenizer([text], 300).save_pretrained(spec["tokenizer"])
    samples = [Sample(f"s{i}", (("text", text),)) for i in range(per_shard * spec["num_shards"])]
    Path(spec["corpus"]).write_text(
        "".join(json.dumps({"id": s.sample_id, "text": s.text}) + "\n" for s in samples)
    )
    shards = [
        Shard(f"{n:05d}", n * per_shard, tuple(samples[n * per_shard : (n + 1) * per_shard]))
        for n in range(spec["num_shards"])
    ]
    store = create(Path(spec["store"]), shards)
    add_teacher(store, TeacherManifest.model_validate(spec["manifest"]))
    x = torch.randn(*lead, num_tokens, dim, generator=torch.Generator().manual_seed(0))
    arrays: dict[str, Any] = {}
    for kind in KINDS:
        for suffix, part in CODECS["int8"].encode(x, kind).items():
            arrays[part_name(kind, suffix)] = np.concatenate([part.numpy()] * per_shard, axis=2)
    start = np.tile(np.arange(num_tokens, dtype=np.int32) * 4, per_shard)
    ptr = np.arange(per_shard + 1, dtype=np.int64) * num_tokens
    tokens = TokenTable((), ptr, start, start, start + 4, np.zeros_like(start, np.int8))
    tokens64 = x.double().numpy()
    mean = tokens64.mean(axis=2)
    m2 = ((tokens64 - mean[:, :, None]) ** 2).sum(axis=2)
    statistics = dict.fromkeys(KINDS, ChannelStatistics(num_tokens, mean, m2))
    for shard in shards:
        ids = tuple(sample.sample_id for sample in shard.samples)
        one = EncodedShard(replace(tokens, sample_ids=ids), arrays)
        publish_shard(store, "synthetic", shard.shard_id, one, statistics)
    size = sum(path.stat().st_size for path in Path(spec["store"]).rglob("*") if path.is_file())
    return {"store_mib": size / 2**20}


def words(spec: dict[str, Any]) -> dict[str, Any]:
    """Cross-entropy, forward and backward, of a student that is little but its vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvdistill.attention import language_head
    from kvdistill.distill.losses.pointwise import cross_entropy

    if not spec["chunked"]:
        language_head.MAX_LOGITS = sys.maxsize
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=spec["vocabulary"], hidden_size=128, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, spec["vocabulary"], (4, spec["tokens"] // 4))
    head = language_head.LanguageHead(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    _, logits = head.run(input_ids=ids, use_cache=False)
    loss = cross_entropy(logits, ids, None)
    loss.backward()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"step_mib": (peak - before) / 2**10, "step_s": seconds, "loss": float(loss)}


def main() -> None:
    spec = json.loads(sys.argv[1])
    works = {"train": train, "extract": extract, "synthesise": synthesise, "words": words}
    work = works[spec["what"]]
    with redirect_stdout(sys.stderr):
        found = work(spec)
    found["wall_s"] = time.perf_counter() - STARTED
    used = resource.getrusage(resource.RUSAGE_SELF)
    found["cpu_s"] = used.ru_utime + used.ru_stime
    found["peak_mib"] = used.ru_maxrss / 2**10
    print(json.dumps(found))


if __name__ == "__main__":
    main()
