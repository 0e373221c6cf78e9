"""A rank that trains to the step that reads the poisoned document and writes its autopsy."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np

from pretrain.autopsy import Autopsies, Recorder
from pretrain.config.schema import load_config
from pretrain.data.batches.samples import SampleRows
from pretrain.data.tokenizer import load_tokenizer
from pretrain.distributed.ranks import initialize
from pretrain.engine.build_engine import build_engine
from pretrain.engine.initialize import initialize_weights
from pretrain.engine.step import train_step
from pretrain.engine.step_gate import StepGate
from pretrain.resilience.spike_guard import SpikeGuard
from pretrain.sharded import ShardedWeights
from pretrain.trainer.corpora import read_again
from pretrain.trainer.plan import Plan, make_plan, training_batches
from pretrain.trainer.run_folder import RunFolder

POISON = "zq" * 300
STEPS_BEFORE = 3


def texts(plan: Plan, samples: range) -> list[str]:
    """Return the inputs of samples of the run, decoded by transformers."""
    feed = plan.corpora.feed()
    rows = SampleRows.empty(len(samples), feed.seq_len, feed.dtype, feed.masked, feed.carries_documents)
    feed.read(feed.at(np.asarray(samples)), rows)
    tokenizer = load_tokenizer(Path(plan.config.tokenizer))
    return [str(tokenizer.decode(tokens)) for tokens in rows.tokens[:, :-1].tolist()]


def examine(run_file: Path, settings: list[str], out: Path) -> None:
    """Be a rank: the autopsies are in the run's folder, and the figures to compare them with in `out`."""
    ranks = initialize()
    plan = make_plan(load_config(run_file, settings), ranks.world_size)
    config, size = plan.config, plan.config.data.largest_batch
    read = texts(plan, range(40 * size))
    poisoned = next(number for number, text in enumerate(read) if POISON[:20] in text and number >= STEPS_BEFORE * size)
    position = (poisoned // size - STEPS_BEFORE) * size

    folder = RunFolder(config.folder, ranks)
    engine = build_engine(plan.config, plan.model_config, plan.ds_config)
    weights = ShardedWeights(engine)
    initialize_weights(weights, config, 0.02)
    gate, recorder = StepGate(engine, SpikeGuard(config.resilience.guard)), Recorder(engine, weights, STEPS_BEFORE)
    gate.watchers.append(recorder.gradients)
    written = Autopsies(folder.path / "autopsies", config, recorder, ranks, partial(read_again, config))
    loader = training_batches(plan, ranks.rank, position)
    paths = []
    for step in range(1, STEPS_BEFORE + 3):
        first, micro_batches = loader.position, loader.next_batch()
        done = train_step(gate, step, micro_batches, 5e-3, ranks, plan.corpora.masked)
        recorder.end_step(step, range(first, first + size), done.losses, 5e-3, done.clip_factor)
        if step > STEPS_BEFORE:
            paths.append(written.write(engine, "the loss is 9.1, which is a made-up spike", micro_batches))
    (out / "no_folder").write_text("a file where the folder should be")
    paths.append(
        Autopsies(out / "no_folder", config, recorder, ranks, partial(read_again, config)).write(
            engine, "not written", micro_batches
        )
    )
    loader.close()
    if ranks.is_first:
        samples = range(position + STEPS_BEFORE * size, position + (STEPS_BEFORE + 1) * size)
        found = {"poisoned": poisoned, "samples": list(samples), "texts": [read[sample] for sample in samples]}
        (out / "found.json").write_text(json.dumps({**found, "paths": [path and str(path) for path in paths]}))
    os._exit(0)
