"""What shows each kind of claim, line by line: it prints what it saw, and leaves the verdict in `bug`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from attncheck.triage.claims import Kind
from attncheck.triage.spelling import arguments, statement, whole_and_placed
from attncheck.triage.subject import NotWritten, Subject

# All ranks see the same, so only one of them prints.
FIRST = "if dist.get_rank() == 0:"


def tried(call: Sequence[str]) -> list[str]:
    return [
        'said = "no exception"',
        "try:",
        *call,
        "except Exception as error:",
        '    said = f"{type(error).__name__}: {error}"',
    ]


def said_op(needle: str) -> list[str]:
    return [
        FIRST,
        '    print(said.partition("\\n")[0])',
        f'bug = "{needle}" in said',
    ]


def _refused(subject: Subject) -> list[str]:
    claim = subject.claim
    call = statement(subject, "out = " if claim.backward else "", "    ")
    if claim.backward:
        call.append("    out.backward(torch.ones_like(out))")
    lines = [*arguments(subject), *tried(call)]
    if claim.kind is Kind.REFUSED:
        return [*lines, *said_op(claim.op)]
    if not claim.exception:
        raise NotWritten("the report does not say which exception it raised")
    lines += [FIRST, '    print(said.partition("\\n")[0])']
    return [*lines, f'bug = said.startswith("{claim.exception}")']


def _no_op(subject: Subject) -> list[str]:
    return [
        *arguments(subject),
        "said = []",
        "",
        "",
        "def watched(name, function):",
        "    def watch(*args, **kwargs):",
        "        given = [x for x in (*args, *kwargs.values()) if isinstance(x, DTensor)]",
        "        if given:",
        "            pointer = given[0].data_ptr()",
        '            said.append(f"{name} is handed {len(given)} DTensors, whose data_ptr() is {pointer}")',
        "            raise RuntimeError(said[-1])",
        "        return function(*args, **kwargs)",
        "",
        "    return watch",
        "",
        "",
        "# The compiled functions: they read memory, so that a DTensor must never come to them.",
        f"for module in ({', '.join(subject.compiled)},):",
        "    for name in dir(module):",
        "        function = getattr(module, name)",
        '        if callable(function) and not isinstance(function, type) and name[0] != "_":',
        "            setattr(module, name, watched(name, function))",
        "try:",
        *statement(subject, "", "    "),
        "except Exception as error:",
        '    said.append(f"{type(error).__name__}: {error}")',
        FIRST,
        '    print(*said[:1] or ["no compiled function was handed a DTensor"])',
        'bug = "is handed" in "".join(said[:1])',
    ]


def _tolerance(subject: Subject) -> str:
    """What no rounding explains, as a share of the largest value."""
    if subject.own_device and subject.setting.dtype == "float32":
        return "(0.1 if dtype == torch.bfloat16 else 1e-4)"
    return "1e-4" if subject.setting.dtype in ("float32", "float64") else "0.1"


def _results(subject: Subject) -> list[str]:
    """`pairs`: by name, what came back of the placed call and of the whole one."""
    attend = subject.name_of_call
    claim, several = subject.claim, len(subject.call.picks) > 1
    if any(spec.mutable for spec in subject.specs) and not claim.gradients:
        mutable = [s.name for s in subject.specs if s.mutable and s.wrap != "plain"]
    else:
        mutable = []
    lines = whole_and_placed(subject)
    if claim.gradients:
        names = ", ".join(f'"{name}"' for name in subject.gradients_of)
        out = '["out"]' if several else ""
        return [
            *lines,
            f"leaves = [{names}]",
            "for name in leaves:",
            "    whole[name].requires_grad_()",
            "    placed[name].requires_grad_()",
            f"expected, actual = {attend}(**whole){out}, {attend}(**placed){out}",
            "dout = torch.randn_like(expected)",
            "placements = [Replicate() if p.is_partial() else p for p in actual.placements]",
            "want = torch.autograd.grad(expected, [whole[n] for n in leaves], dout)",
            "dout = distribute_tensor(dout, mesh, placements)",
            "got = torch.autograd.grad(actual, [placed[n] for n in leaves], dout)",
            'pairs = {f"gradient of {n}": (g, w) for n, g, w in zip(leaves, got, want)}',
        ]
    if several:
        lines += [
            f"expected, actual = {attend}(**whole), {attend}(**placed)",
            "pairs = {name: (actual[name], expected[name]) for name in expected}",
        ]
    else:
        lines += [
            f"expected, actual = {attend}(**whole), {attend}(**placed)",
            'pairs = {"out": (actual, expected)}',
        ]
    lines += [f'pairs["{name}"] = placed["{name}"], whole["{name}"]' for name in mutable]
    return lines


_FULL = "    actual = actual.full_tensor() if isinstance(actual, DTensor) else actual"


def _wrong(subject: Subject) -> list[str]:
    return [
        *_results(subject),
        "bug = False",
        "for name, (actual, expected) in pairs.items():",
        '    placed_as = getattr(actual, "placements", "an ordinary tensor")',
        _FULL,
        "    error = (actual - expected).abs().max().item()",
        f"    bound = {_tolerance(subject)} * expected.abs().max().item()",
        "    bug |= not error <= bound",
        "    " + FIRST,
        '        print(f"{name}, {placed_as}: largest error {error:.1e}, expected below {bound:.0e}")',
    ]


def _drift(subject: Subject) -> list[str]:
    attend = subject.name_of_call
    if subject.claim.gradients or len(subject.call.picks) > 1:
        raise NotWritten("the drift is in a gradient")
    root = 2 * subject.ranks
    return [
        *whole_and_placed(subject),
        "exact = {n: t.double() if t.is_floating_point() else t for n, t in whole.items()}",
        f"exact, expected, actual = {attend}(**exact), {attend}(**whole), {attend}(**placed)",
        "actual = actual.full_tensor()",
        "own = (expected - exact).abs().max().item()",
        "error = (actual - exact).abs().max().item()",
        f"rounding = 2 * {root} ** 0.5 * torch.finfo(expected.dtype).eps * exact.abs().max().item()",
        FIRST,
        '    print(f"error on whole tensors {own:.2e}, sharded {error:.2e}")',
        "bug = error > 2 * own + rounding",
    ]


def _stale(subject: Subject) -> list[str]:
    attend = subject.name_of_call
    if len(subject.call.picks) > 1 or subject.claim.gradients:
        raise NotWritten("it has several results")
    return [
        *whole_and_placed(subject),
        f"expected, errors = {attend}(**whole), []",
        "for _ in range(2):",
        f"    actual = {attend}(**placed).full_tensor()",
        "    errors.append((actual - expected).abs().max().item())",
        FIRST,
        '    print(f"largest error of the first call {errors[0]:.1e}, of the second {errors[1]:.1e}")',
        f"bug = not errors[1] <= errors[0] + {_tolerance(subject)} * expected.abs().max().item()",
    ]


def _named_outputs(subject: Subject) -> list[str]:
    """`results`: what came back of the placed call, by name."""
    lines = arguments(subject)
    if len(subject.call.picks) > 1 and not subject.claim.backward:
        call = subject.call
        text = statement(_with_picks(subject, ""), "returned = ", "")
        named = ", ".join(f'"{name}": returned{place}' for name, place in call.picks.items())
        return [*lines, *text, f"results = {{{named}}}"]
    lines += statement(subject, "out = ", "")
    if not subject.claim.backward:
        return [*lines, 'results = {"out": out}']
    names = [*subject.gradients_of]
    leaves = [name if subject.call.by_name else f't["{name}"]' for name in names]
    lines.append("out.backward(torch.ones_like(out))")
    gradients = [f'"gradient of {n}": {leaf}.grad' for n, leaf in zip(names, leaves, strict=True)]
    return [*lines, f'results = {{"out": out, {", ".join(gradients)}}}']


def _with_picks(subject: Subject, out: str) -> Subject:
    return replace(subject, call=replace(subject.call, picks={"out": out}))


def _replicas(subject: Subject) -> list[str]:
    return [
        *_named_outputs(subject),
        "bug = False",
        "for name, x in results.items():",
        "    local = x.to_local().contiguous()",
        "    for axis, placement in enumerate(x.placements):",
        "        if placement.is_replicate():",
        "            parts = [torch.empty_like(local) for _ in range(mesh.size(axis))]",
        "            dist.all_gather(parts, local, group=mesh.get_group(axis))",
        "            gap = max((part - parts[0]).abs().max().item() for part in parts)",
        "            bug |= gap > 0",
        "            " + FIRST,
        '                print(f"{name}, {x.placements}: replicas differ by up to {gap:.1e}")',
    ]


def _dropout(subject: Subject) -> list[str]:
    return [
        "# q = 0 and v = 1: what is not 0 in the output was kept.",
        *arguments(subject),
        *statement(subject, "out = ", ""),
        f"masks = [None] * {subject.ranks}",
        "dist.all_gather_object(masks, out.to_local().detach().cpu() > 0)",
        "same = torch.equal(masks[0], masks[1])",
        FIRST,
        '    print(f"output {out.placements}: dropped {(~masks[0]).float().mean():.0%} on rank 0, "',
        '          f"{(~masks[1]).float().mean():.0%} on rank 1, the same elements: {same}")',
        "bug = same and any(p.is_shard() for p in out.placements)",
    ]


def _shape(subject: Subject) -> list[str]:
    call = statement(subject, "out = " if subject.claim.backward else "", "    ")
    if subject.claim.backward:
        call.append("    out.backward(torch.ones_like(out))")
    return [
        *arguments(subject),
        "said = []",
        "",
        "",
        "class Shapes(TorchDispatchMode):",
        '    """Looks at each DTensor that an op gives."""',
        "",
        "    def __torch_dispatch__(self, op, types, args=(), kwargs=None):",
        "        result = op(*args, **(kwargs or {}))",
        "        for x in tree_leaves(result):",
        "            if isinstance(x, DTensor):",
        "                want = compute_local_shape_and_global_offset(x.shape, mesh, x.placements)[0]",
        "                got = x._local_tensor.shape",
        "                if tuple(got) != tuple(want):",
        '                    said.append(f"{op}: {x.placements} of {tuple(x.shape)} is {tuple(want)}, "',
        '                                f"rank {dist.get_rank()} holds {tuple(got)}")',
        "        return result",
        "",
        "",
        "try:",
        "    with Shapes():",
        *("    " + line for line in call),
        "except Exception as error:",
        '    said.append(f"{type(error).__name__}: {error}")',
        f"everyone = [None] * {subject.ranks}",
        "dist.all_gather_object(everyone, said)",
        "said = [line for lines in everyone for line in lines]",
        FIRST,
        '    print(*said[:1] or ["each local tensor has the shape that its placement says"])',
        'bug = " holds (" in "".join(said[:1])',
    ]


def _plain(subject: Subject) -> list[str]:
    return [
        *_named_outputs(subject),
        "kinds = {name: type(x).__name__ for name, x in results.items()}",
        FIRST,
        "    print(kinds)",
        'bug = any(kind != "DTensor" for kind in kinds.values())',
    ]


def _communicates(subject: Subject) -> list[str]:
    claim = subject.claim
    inside = "    "
    call = statement(subject, "out = ", inside)
    if claim.backward and claim.gradients:  # the forward is not in question
        call = statement(subject, "out = ", "")
        watched = [*call, "with CommDebugMode() as comm:"]
    else:
        watched = ["with CommDebugMode() as comm:", *call]
    if claim.backward:
        watched.append("    out.backward(torch.ones_like(out))")
    return [
        *arguments(subject),
        *watched,
        'counts = {str(op).split(".")[-1]: n for op, n in comm.get_comm_counts().items()}',
        FIRST,
        '    print(f"output {out.placements}, collectives: {counts}")',
        "bug = comm.get_total_counts() > 0",
    ]


def _slow(subject: Subject) -> list[str]:
    call = statement(subject, "out = " if subject.claim.backward else "", "    ")
    if subject.claim.backward:
        call.append("    out.backward(torch.ones_like(out))")
    return [
        *arguments(subject),
        "seconds = []",
        "for _ in range(2):",
        "    began = time.perf_counter()",
        "    with contextlib.suppress(Exception):  # what is refused can be slow, too",
        *("    " + line for line in call),
        "    seconds.append(time.perf_counter() - began)",
        FIRST,
        '    print(f"first call {seconds[0]:.1f} s, second {seconds[1]:.3f} s")',
        "bug = seconds[0] > 1 and seconds[0] > 20 * seconds[1]",
    ]


def _crash(subject: Subject) -> list[str]:
    call = statement(subject, "out = " if subject.claim.backward else "", "")
    if subject.claim.backward:
        call.append("out.backward(torch.ones_like(out))")
    return [
        *arguments(subject),
        FIRST,
        '    print("the call begins: BUG where the process dies of it", flush=True)',
        *call,
        "bug = False",
    ]


def _diverges(subject: Subject) -> list[str]:
    call = statement(subject, "out = ", "        ")
    if subject.claim.backward:
        call.append("        out.backward(torch.ones_like(out))")
    return [
        *arguments(subject),
        "with CommDebugMode() as comm:",
        "    try:",
        *call,
        '        said = f"output {out.placements}"',
        "    except Exception as error:",
        '        said = f"{type(error).__name__}: {error}".partition("\\n")[0]',
        '        said = re.sub(r"[0-9]+", "#", said)  # shards differ in size',
        'counts = {str(op).split(".")[-1]: n for op, n in comm.get_comm_counts().items()}',
        'said += f", collectives: {counts}"',
        "# Not with a collective: ranks that part never meet again.",
        "store = dist.distributed_c10d._get_default_store()",
        'store.set(f"rank {dist.get_rank()}", said)',
        f'everyone = [store.get(f"rank {{rank}}").decode() for rank in range({subject.ranks})]',
        FIRST,
        "    for rank, said in enumerate(everyone):",
        '        print(f"rank {rank}: {said}")',
        "bug = len(set(everyone)) > 1",
    ]


COMPARING = (Kind.WRONG, Kind.DRIFT, Kind.STALE)
BODIES: Mapping[Kind, Callable[[Subject], list[str]]] = {
    Kind.REFUSED: _refused,
    Kind.RAISES: _refused,
    Kind.NO_OP: _no_op,
    Kind.WRONG: _wrong,
    Kind.DRIFT: _drift,
    Kind.REPLICAS: _replicas,
    Kind.DROPOUT: _dropout,
    Kind.SHAPE: _shape,
    Kind.STALE: _stale,
    Kind.PLAIN: _plain,
    Kind.COMMUNICATES: _communicates,
    Kind.SLOW: _slow,
    Kind.CRASH: _crash,
    Kind.DIVERGES: _diverges,
}
