"""Encode batches of lines, in this process or in several worker processes."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process

from finetune.data.encode import Encoder, Lines, Outcome, Recipe, make_chunk
from finetune.errors import OutOfResource

MOST_WORKERS = 8  # each holds two tokenizers in about 80 MiB, and one process writes all they send
NOTHING = Outcome(make_chunk([], [], []), [], None)


def worker_count() -> int:
    """Processes to encode with: one for each core this process may use, at most MOST_WORKERS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def encode_batches(batches: Iterator[Lines], recipe: Recipe, workers: int) -> Iterator[Outcome]:
    """Yield the outcome of each batch of numbered lines, in order.

    0 `workers` encode in this process; otherwise at most 2 batches per worker wait. A batch without lines costs
    nothing. Raises OutOfResource if a worker is killed.
    """
    if workers == 0:
        encoder = functools.cache(Encoder)
        yield from (encoder(recipe).encode(batch) if batch else NOTHING for batch in batches)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (recipe,)) as pool:
        running: deque[Future[Outcome]] = deque()
        try:
            for batch in batches:
                running.append(pool.submit(_encode, batch) if batch else _done(NOTHING))
                if len(running) >= 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            killed = "a process that encodes rows was killed, probably out of memory"
            raise OutOfResource(killed, "free some memory and try again") from None


_encoder: Encoder


def _start_worker(recipe: Recipe) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(recipe)


def _end_with_parent() -> None:
    """Exit when the main process is gone: a killed one cannot end its workers, which would wait forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(lines: Lines) -> Outcome:
    return _encoder.encode(lines)


def _done(outcome: Outcome) -> Future[Outcome]:
    future: Future[Outcome] = Future()
    future.set_result(outcome)
    return future
