"""Bytes that the instructions of a compiled program read from and write to HBM.

Every instruction of the schedule reads its operands and writes its results; what is fused into one
stays on the chip, as do arrays that the compiler laid into VMEM. Of an operand that is only sliced,
the slices are read; of a result that is an operand with a slice replaced, the slice is written. An
estimate from above where a fusion reads less of an operand in another way, and from below where a
kernel reads one several times.
"""

import re

from sleepnet.evaluation.hlo import Instruction, Module

_MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
# Custom calls that only name memory.
_NAMES_MEMORY = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")


def hbm_bytes(module: Module, computation: str, instruction: Instruction) -> int:
    """Of one run of an instruction; of a loop none, as its body's instructions move them."""
    operation = instruction.operation
    if operation in _MOVES_NOTHING or operation.endswith("-done"):
        return 0
    if operation == "custom-call" and any(f'"{n}"' in instruction.line for n in _NAMES_MEMORY):
        return 0
    if operation.endswith("-start"):
        return _started(module, computation, instruction)
    return _read(module, computation, instruction) + _written(module, computation, instruction)


def _started(module, computation, instruction):
    """The results of the start of a copy, slice or collective are operand, result and a context."""
    operands = module.operands(computation, instruction)
    received = [x for x in instruction.results if x.bytes > 4][-1:]
    if instruction.operation == "copy-start":  # result first
        received = instruction.results[:1]
    read = received if instruction.operation == "slice-start" else operands
    size = sum(x.bytes for x in read) if any(not x.on_chip for x in operands) else 0
    return size + sum(x.bytes for x in received if not x.on_chip)


def _read(module, computation, instruction) -> int:
    known = module.computations[computation]
    if instruction.operation in _SLICES:
        operands = module.operands(computation, instruction)
        return sum(x.bytes for x in instruction.results) if not operands[0].on_chip else 0
    total = 0
    for i, name in enumerate(instruction.operands):
        if name not in known:
            continue
        arrays = [x for x in known[name].results if not x.on_chip]
        whole = sum(x.bytes for x in arrays)
        if whole and instruction.operation == "fusion":
            whole = min(whole, _read_within(module, instruction.called[0], i))
        elif instruction.operation == "dynamic-update-slice" and i == 0:
            whole = 0
        total += whole
    return total


def _read_within(module, computation, index) -> int:
    """Of parameter `index` of a fused computation."""
    instructions = module.computations[computation].values()
    parameter = next(
        x for x in instructions
        if x.operation == "parameter" and re.search(rf"parameter\({index}\)", x.line)
    )  # fmt: skip
    return _used(module, computation, parameter)


def _used(module, computation, value) -> int:
    size = sum(x.bytes for x in value.results)
    total = 0
    for user in module.computations[computation].values():
        for place in (i for i, name in enumerate(user.operands) if name == value.name):
            if user.operation in _SLICES and place == 0:
                total += sum(x.bytes for x in user.results)
            elif user.operation == "dynamic-update-slice" and place == 0:
                total += 0  # overwritten in place
            elif user.operation == "bitcast":
                total += _used(module, computation, user)
            elif user.operation == "fusion":
                total += _read_within(module, user.called[0], place)
            else:
                total += size
    return min(size, total)


def _written(module, computation, instruction) -> int:
    if all(x.on_chip for x in instruction.results):
        return 0
    if instruction.operation == "fusion":
        called = instruction.called[0]
        return _written_by(module, called, module.root(called), instruction.results)
    if instruction.operation == "dynamic-update-slice":
        return _updates(module, computation, instruction)
    return sum(x.bytes for x in instruction.results if not x.on_chip)


def _written_by(module, computation, root, results) -> int:
    """What a fused computation leaves in `results`, which may be on the chip in part."""
    known = module.computations[computation]
    if root.operation == "tuple" and len(root.operands) == len(results):
        pairs = zip(root.operands, results, strict=True)
        return sum(
            _written_by(module, computation, known[name], (x,)) for name, x in pairs
            if not x.on_chip
        )  # fmt: skip
    if root.operation == "bitcast" and root.operands[0] in known:
        return _written_by(module, computation, known[root.operands[0]], results)
    if root.operation == "dynamic-update-slice":
        return _updates(module, computation, root)
    if root.operation == "fusion":
        called = root.called[0]
        return _written_by(module, called, module.root(called), results)
    return sum(x.bytes for x in results if not x.on_chip)


def _updates(module, computation, instruction) -> int:
    update = module.computations[computation][instruction.operands[1]]
    return sum(x.bytes for x in update.results)
