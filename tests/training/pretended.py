"""Threads that take themselves for the processes of one run, to see what `agree` makes of it."""

import threading

import jax
import numpy as np
import waiting

from sleepnet.training import multihost


class Pretended:
    """So many processes, which nothing connects but `agree`."""

    def __init__(self, monkeypatch, count: int):
        self._count = count
        self._here = threading.local()
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", self._index)
        monkeypatch.setattr(multihost.multihost_utils, "process_allgather", self._gather)
        monkeypatch.setattr(multihost.multihost_utils, "broadcast_one_to_all", self._broadcast)

    def run(self, act):
        """`act(process)` in each of them at once; what it returned or raised there."""
        self._meeting = threading.Barrier(self._count, timeout=waiting.PATIENCE / 2)
        self._brought, ends = [None] * self._count, [None] * self._count

        def live(index):
            self._here.index = index
            try:
                ends[index] = act(index)
            except Exception as error:
                ends[index] = error

        threads = [
            threading.Thread(target=live, args=(i,), daemon=True) for i in range(self._count)
        ]
        for thread in threads:
            thread.start()
        waiting.join(*threads)
        lonely = [end for end in ends if isinstance(end, threading.BrokenBarrierError)]
        assert not lonely, f"a process waited for others that had gone on: {ends}"
        return ends

    def _index(self) -> int:
        return getattr(self._here, "index", 0)

    def _gather(self, value):
        """All meet twice: when all have brought theirs, and when all have taken what there is."""
        self._brought[self._index()] = value
        self._meeting.wait()
        taken = np.stack(self._brought)
        self._meeting.wait()
        return taken

    def _broadcast(self, value):
        shapes = self._gather(np.asarray(value).shape)
        assert (shapes == shapes[0]).all(), "processes would compile different programs"
        return self._gather(value)[0]
