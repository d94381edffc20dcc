"""What a store is to hold for an experiment, and what of it is there.

Needs neither a model nor torch, so that asking is quick.
"""

from __future__ import annotations

from kvdistill.config import Experiment
from kvdistill.corpus import cut
from kvdistill.pipelines.corpus import load_corpus
from kvdistill.store.layout import StorePaths
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import create


def prepare(experiment: Experiment) -> KVStore:
    """Create the store of an experiment's corpus, or open the one that is there.

    No teacher is loaded: each registers itself when its first shard is extracted.

    Raises:
        CorpusError: the corpus is missing, empty or malformed.
        StoreMismatch: the store was made from another corpus, or cut differently.
    """
    samples = load_corpus(experiment.corpus).train
    return create(experiment.store, list(cut(samples, experiment.corpus.shard_chars)))


def is_done(store: KVStore, experiment: Experiment, name: str, shard_id: str) -> bool:
    """Committed, and by the extraction that the config asks for.

    Anything doubtful counts as pending: the teacher is then loaded, and the comparison of
    manifests says precisely what differs.
    """
    if not StorePaths(store.paths.root).teacher_manifest(name).is_file():
        return False
    manifest = store.teacher(name)
    same = (
        manifest.extraction_fingerprint == experiment.extraction_fingerprint(name)
        and manifest.model == experiment.teachers[name].model
        and manifest.backend == experiment.extraction.backend
    )
    return same and store.is_committed(name, shard_id)
