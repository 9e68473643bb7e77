"""Results files: what has ended well is not run again, whatever ended the batch before."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import bough as bo

ITEMS = [{"number": i} for i in range(10)]


@bo.function
def square(s: bo.State, number: int, offset: int = 0) -> int:
    s += bo.user(f"{number} squared?") + bo.assistant(bo.gen("square"))
    s["double"] = 2 * number
    if number == 4:
        raise LookupError("unlucky")
    return int(s["square"]) + offset


class Counting(bo.ScriptedBackend):
    """Squares numbers, fails at 7 as long as it `is_full`, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(self._reply)
        self.asked: list[int] = []
        self.is_full = True

    def _reply(self, text: str, params: object) -> str:
        number = int(text.split("\n")[1].split()[0])
        self.asked.append(number)
        if number == 7 and self.is_full:
            raise bo.ResourceExhausted("no room", tokens=9)
        return str(number * number)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_rerun_runs_only_what_did_not_end_well(path: Path) -> None:
    first, second = Counting(), Counting()
    before = square.run_batch(ITEMS, resume=path, backend=first)
    assert sorted(first.asked) == list(range(10))
    second.is_full = False
    after = square.run_batch(ITEMS, resume=path, backend=second)
    assert sorted(second.asked) == [4, 7]
    assert [state.is_saved for state in after] == [i not in (4, 7) for i in range(10)]
    assert [state.index for state in after] == list(range(10))
    for old, new in zip(before, after, strict=True):
        if new.index == 4:
            assert isinstance(new.error(), LookupError)
            continue
        assert new.error() is None
        assert (new["square"], new["double"], new.ret_value) == (str(new.index**2), 2 * new.index, new.index**2)
        if new.is_saved:
            assert (new.text(), new.messages()) == (old.text(), old.messages())
            assert new.get_meta_info("square") == old.get_meta_info("square")
            assert new.num_attempts == 1
    third = Counting()
    square.run_batch(ITEMS, resume=path, backend=third)
    assert third.asked == [4]


def test_a_saved_result_can_be_read_in_every_way_and_takes_no_more_text(path: Path) -> None:
    square.run_batch(ITEMS[:1], resume=path, backend=Counting())
    (state,) = square.run_batch(ITEMS[:1], resume=path, backend=Counting())
    assert isinstance(state, bo.ItemState)
    assert state.is_saved
    assert "square" in state
    assert list(state.text_iter()) == [state.text()]
    assert "0 squared?" in state.tree()
    state.sync()
    with pytest.raises(bo.UnknownVariable, match="assigned: double, square"):
        state["cube"]
    with pytest.raises(bo.InvalidRequest, match="no meta information"):
        state.get_meta_info("double")
    for change in (lambda: state.__iadd__("more"), lambda: state.fork(2)):
        with pytest.raises(bo.InvalidRequest, match="this result was read from a file"):
            change()


def test_a_line_tells_all_of_an_item_and_only_its_owner_can_read_it(path: Path) -> None:
    square.run_batch(ITEMS, resume=path, backend=Counting())
    assert path.stat().st_mode & 0o777 == 0o600
    lines = {line["item"]: line for line in lines_of(path)}
    assert lines[3]["variables"] == {"square": "9", "double": 6}
    assert lines[3]["messages"][1] == {"role": "assistant", "content": "9"}
    assert lines[3]["usage"]["completion_tokens"] == 1
    assert lines[3]["meta"]["square"]["finish_reason"] == "stop"
    assert lines[7]["error"] == {"type": "ResourceExhausted", "message": "no room", "details": {"tokens": "9"}}
    assert lines[4]["error"] == {"type": "LookupError", "message": "unlucky"}
    assert lines[4]["variables"] == {"square": "16", "double": 8}, "what there is is kept of a failure too"


def test_items_are_known_by_program_arguments_and_defaults(path: Path) -> None:
    backend = Counting()
    square.run_batch([{"number": 2}, {"number": 2}], resume=path, backend=backend)
    assert backend.asked == [2, 2], "equal items are items of their own"
    backend.asked.clear()
    square.run_batch([(2,), {"number": 2, "offset": 0}], resume=path, backend=backend)
    square.bind(offset=0).run_batch([(2,)], resume=path, backend=backend)
    assert backend.asked == []
    for items, program, given in (
        ([(2,)] * 3, square, {}),
        ([(2, 1)], square, {}),
        ([(2,)], square.bind(offset=5), {}),
        ([(2,)], square, {"temperature": 0.5}),
        ([(2,)], square, {"seed": 1}),
    ):
        backend.asked.clear()
        options: dict[str, Any] = given
        program.run_batch(items, resume=path, backend=backend, **options)
        assert backend.asked == [2], (items, program, given)


def test_a_line_torn_by_a_crash_is_forgotten(path: Path) -> None:
    square.run_batch(ITEMS[:3], resume=path, max_in_flight=1, backend=Counting())
    whole = path.read_bytes()
    for cut in (1, 20, len(whole) - whole.rfind(b"\n", 0, -1) - 1):
        path.write_bytes(whole[:-cut])
        backend = Counting()
        states = square.run_batch(ITEMS[:3], resume=path, max_in_flight=1, backend=backend)
        assert backend.asked == [2]
        assert [state["square"] for state in states] == ["0", "1", "4"]
        assert len(lines_of(path)) == 3


def test_a_file_that_is_none_of_ours_is_refused_and_left_alone(path: Path) -> None:
    square.run_batch(ITEMS[:2], resume=path, backend=Counting())
    good = path.read_text()
    for bad, words in (
        ("no json\n" + good, ":1 is no line of a results file"),
        (good + '{"v":1}\n', ":3 is no line of a results file"),
        (good.replace('"v":1', '"v":99'), ":1 has version 99, this is 1"),
    ):
        path.write_text(bad)
        with pytest.raises(bo.InvalidRequest, match=words):
            square.run_batch(ITEMS[:2], resume=path, backend=Counting())
        assert path.read_text() == bad
    with pytest.raises(FileNotFoundError):
        square.run_batch(ITEMS, resume=path.parent / "missing" / "file", backend=Counting())


def test_arguments_have_to_be_json_and_may_be_data(path: Path) -> None:
    @dataclasses.dataclass
    class Question:
        number: int

    @bo.function
    def ask(s: bo.State, question: Any) -> None:
        s += f"\n{question.number} " + bo.gen("x")

    backend = Counting()
    for _ in range(2):
        ask.run_batch([(Question(1),), (Question(2),)], resume=path, backend=backend)
    assert sorted(backend.asked) == [1, 2]
    with pytest.raises(bo.InvalidRequest, match="item 1 of the batch cannot be named in a results file"):
        ask.run_batch([(Question(1),), (threading.Lock(),)], resume=path, backend=backend)


def test_a_value_that_is_no_json_is_missed_where_it_is_read(path: Path) -> None:
    @bo.function
    def keeps(s: bo.State) -> Any:
        s["lock"] = threading.Lock()
        s["number"] = 1
        forks = s.fork(1)
        return forks

    for expected in (False, True):
        (state,) = keeps.run_batch([{}], resume=path, backend=Counting())
        assert state.is_saved == expected
        assert state["number"] == 1
    with pytest.raises(bo.InvalidRequest, match="'lock' was not kept in the results file"):
        state["lock"]
    with pytest.raises(bo.InvalidRequest, match="'<ret_value>' was not kept in the results file"):
        _ = state.ret_value


def test_one_batch_at_a_time_writes_a_file(path: Path) -> None:
    states = square.run_batch(ITEMS, order="completion", resume=path, backend=Counting())
    next(states)
    with pytest.raises(bo.InvalidRequest, match="another batch writes"):
        square.run_batch(ITEMS, resume=path, backend=Counting())
    states.close()  # type: ignore[attr-defined]
    never_begun = square.run_batch(ITEMS, order="completion", resume=path, backend=Counting())
    del never_begun
    left = Counting()
    left.is_full = False
    assert len(square.run_batch(ITEMS, resume=path, backend=left)) == 10


def test_what_has_ended_before_an_early_end_is_kept(path: Path) -> None:
    backend = Counting()
    states = square.run_batch(ITEMS[:4], order="completion", max_in_flight=1, resume=path, backend=backend)
    read = next(states)
    states.close()  # type: ignore[attr-defined]
    kept = {line["item"] for line in lines_of(path)}
    assert read.index in kept
    backend.asked.clear()
    square.run_batch(ITEMS[:4], resume=path, backend=backend)
    assert {*backend.asked} | kept == set(range(4))
    assert not {*backend.asked} & kept


def test_a_disk_that_is_full_ends_the_batch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        square.run_batch(ITEMS, resume=path, max_in_flight=2, backend=Counting())
