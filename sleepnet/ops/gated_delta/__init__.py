"""The local rules that write and read fast weights; the definitions stand in `rules`."""

from sleepnet.ops.gated_delta.rules import chunked, compose, recurrent, step, summarize

__all__ = ["chunked", "compose", "recurrent", "step", "summarize"]
