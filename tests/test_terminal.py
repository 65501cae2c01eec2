import io

from rich.console import Console

from anncvt import terminal
from anncvt.progress import SILENT


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 5.0, 12.0, 13.0, 30.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.Lines().task("fit", 4) as task:
        for step in range(3):
            task.advance(1, loss=0.5 / (step + 1))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["fit: 2/4 12 s 12 s left loss 0.25", "fit: 3/4 30 s 10 s left loss 0.1667"]


def test_a_resumed_task_is_not_taken_for_a_fast_one(capsys, monkeypatch):
    clock = iter([0.0, 0.01, 20.0, 21.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.Lines().task("distil", 100) as task:
        task.advance(90)
        task.advance(5)
    assert capsys.readouterr().err.splitlines()[0] == "distil: 95/100 20 s 20 s left"


def test_a_short_task_leaves_no_line(capsys):
    with terminal.Lines().task("fit", 4) as task:
        task.advance(4)
    assert capsys.readouterr().err == ""


def test_quiet_and_plain(capsys):
    with terminal.reporter(quiet=True) as progress:
        assert progress is SILENT
    with terminal.reporter() as progress:  # pytest's stderr is no terminal
        progress.note("assumed something")
    assert capsys.readouterr().err == "note: assumed something\n"


def test_bars_show_count_and_figures(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "WORTH_SHOWING", 0.0)
    with terminal.Bars(Console(file=screen, force_terminal=True, width=150)) as bars:
        with bars.task("fit layers", 4) as task:
            task.advance(2, loss=0.125, layer="conv[1]")
        with bars.task("exporting", None):
            pass
        bars.note("a [note]")
    shown = screen.getvalue()
    assert "fit layers" in shown and "2/4" in shown and "loss 0.125 layer conv[1]" in shown
    assert "a [note]" in shown and "exporting" in shown and "1/1" not in shown, "what has no steps shows no count"


def test_short_bars_vanish():
    screen = io.StringIO()
    with terminal.Bars(Console(file=screen, force_terminal=True, width=150)) as bars, bars.task("short", 1) as task:
        task.advance()
    assert screen.getvalue().rpartition("short")[2].count("1/1") <= 1
