"""Whether a store holds what an experiment asks for. Imports neither torch nor a model."""

from __future__ import annotations

from kvdistill.config.experiment import Experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.corpus.samples import cut_into_shards
from kvdistill.store.format import StorePaths
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
    return create(experiment.store, list(cut_into_shards(samples, experiment.corpus.shard_chars)))


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
