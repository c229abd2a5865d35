"""The benchmark: fair turns, rows that say what they say, whole files, and rivals that need not be there."""

import argparse
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from deepknn_lib import bench, bench_data, bench_training
from deepknn_lib.bench import COLUMNS, FAISS, OURS, PARTS, PML, SKLEARN

CPU = torch.device("cpu")
ON_CPU = [part for part in PARTS if part != "epoch"]


def arguments(*given):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(given)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, shared_data):
    """The folder that the whole command leaves, with tiny sizes."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPKNN_DATA", str(shared_data))
        assert bench.run(arguments("--quick", "--device", "cpu", "--out", str(folder))) == 0
    return folder


@pytest.mark.parametrize("part", ON_CPU)
def test_the_command_leaves_rows_with_all_columns_and_ratios_of_their_times(quick, part):
    rows = pd.read_csv(quick / f"{part}.csv")
    assert tuple(rows.columns) == COLUMNS and set(rows["part"]) == {part}
    about = rows[["what", "setting", "machine", "versions"]]
    assert about.notna().all(axis=None) and not (about == "").any(axis=None)
    measured = rows[rows["median"].notna()]
    assert len(measured) and (measured["repetitions"] >= 1).all()
    assert (measured["low"].fillna(0) <= measured["median"]).all()
    for _, pair in measured.groupby(["setting", "unit"], sort=False):
        ours, rivals = pair.iloc[0], pair.iloc[1:]
        assert np.isnan(ours["ratio"])
        for rival in rivals.itertuples():
            ratios = sorted([rival.low / ours["high"], rival.high / ours["low"]])
            if rival.unit == "images/s":
                ratios = sorted([ours["low"] / rival.high, ours["high"] / rival.low])
            assert ratios[0] * 0.999 <= rival.ratio <= ratios[1] * 1.001
    judged = rows[rows["target"].fillna("").str.startswith("ratio") & rows["ratio"].notna()]
    least = judged["target"].str.extract(r">= ([\d.]+)")[0].astype(float)
    assert (judged["met"].astype(bool) == (judged["ratio"] >= least)).all()


@pytest.mark.parametrize("part", ON_CPU)
def test_the_command_leaves_a_figure_a_part_and_nothing_half_written(quick, part):
    with Image.open(quick / f"{part}.png") as image:
        assert min(image.size) > 200 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert (quick / f"{part}.pdf").read_bytes().startswith(b"%PDF")
    assert {path.name for path in quick.iterdir()} == {p + s for p in ON_CPU for s in (".csv", ".png", ".pdf")}


def test_what_each_part_says(quick):
    table = {part: pd.read_csv(quick / f"{part}.csv") for part in ON_CPU}
    assert list(table["step"]["what"]) == ["deep kNN", "weighted cross-entropy"] * 2
    assert set(table["images"]["unit"]) == {"images/s"} and len(table["images"]) == 4
    assert {"ratio >= 3", "ratio >= 1"} == set(table["images"]["target"].dropna())
    alone = {f"{OURS} without FAISS"} if bench.installed(FAISS) else set()
    assert {OURS, FAISS, SKLEARN} | alone == set(table["search"]["what"])
    assert table["search"].query("what == @OURS")["peak_mb"].notna().all()
    assert "power <= 2.2" in set(table["loss"]["target"])
    assert 0 < table["start"]["median"].iloc[-1] < 60 and table["start"]["target"].iloc[-1] == "median <= 10 s"


def test_a_gpus_part_counts_images_and_work_and_is_refused_on_a_cpu(tmp_path):
    fed, work = (pd.DataFrame(rows) for rows in bench_training.epoch(CPU, True))
    assert list(fed["what"]) == ["training.fit", "one fixed batch"] and fed["target"].iloc[1] == "ratio >= 0.95"
    assert work["ratio"].iloc[1] == pytest.approx(work["median"].iloc[0] / work["median"].iloc[1])
    with pytest.raises(ValueError, match="needs a GPU"):
        bench.bench(["epoch"], tmp_path, "cpu", True)


def test_an_unknown_part_is_an_error_that_lists_them(tmp_path):
    with pytest.raises(ValueError, match="'speed'; choose of step, loss, images, search, start, epoch"):
        bench.bench(["loss", "speed"], tmp_path, "cpu", True)
    assert not list(tmp_path.iterdir())


def test_rivals_that_are_not_installed_have_rows_that_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_MODULES", {PML: "no_such_module", FAISS: "no_such_module"})
    table = bench.bench(["loss", "search"], tmp_path, "cpu", True)
    missing = table[table["what"].isin([PML, FAISS])]
    assert len(missing) == 4 and missing["note"].str.contains("not installed").all()
    assert missing[["median", "ratio", "met"]].isna().all(axis=None)
    ours = table[table["what"] == OURS]
    assert ours["median"].iloc[0] > 0 and SKLEARN in set(table["what"])
    assert table.loc[table["what"] == SKLEARN, "target"].isna().all()  # FAISS's target is not scikit-learn's


def test_a_slow_search_is_left_out_with_its_expected_time(monkeypatch):
    monkeypatch.setattr(bench_data, "_expected", lambda *_: 123.4)
    rows = next(bench_data.search(CPU, True))
    assert rows[-1]["what"] == SKLEARN and "about 123 s" in rows[-1]["note"] and "median" not in rows[-1]


def test_a_search_that_finds_others_stops_the_benchmark(monkeypatch):
    found = {OURS: lambda: torch.arange(10).view(2, 5), SKLEARN: lambda *_: np.arange(1, 11).reshape(2, 5)}
    monkeypatch.setattr(bench_data, "searches", lambda *_: found)
    with pytest.raises(ValueError, match="agree on 80.00%"):
        next(bench_data.search(CPU, True))


@pytest.mark.parametrize("size, width", [(96, 128), (40, 512), (300, 8)])
def test_the_two_losses_and_their_gradients_agree(size, width):
    pytest.importorskip("pytorch_metric_learning")
    ours, theirs = (call() for call in bench_training.losses(size, width, CPU).values())
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-6)


def test_losses_that_differ_stop_the_benchmark(monkeypatch):
    monkeypatch.setattr(bench_training, "losses", lambda *_: {n: lambda n=n: (len(n), None) for n in (OURS, PML)})
    with pytest.raises(ValueError, match="the losses differ at B=42"):
        next(bench_training.loss(CPU, True))


@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_slope_of_a_power_is_that_power(power):
    sizes = np.array([1024, 2048, 4096, 8192])
    assert bench.slope(sizes, 3.7 * sizes.astype(float) ** power) == pytest.approx(power)


def test_the_slope_leaves_out_what_was_too_small_to_see():
    assert bench.slope([1, 2, 4], [0, 4, 16]) == pytest.approx(2)
    assert np.isnan(bench.slope([1, 2], [0, 3]))


def test_contenders_take_turns_warm_and_the_order_is_turned_round():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = bench.alternate(contenders, CPU, 3, 3)
    assert "".join(calls) == "ab" + "abbaab" and [len(spent) for spent in times.values()] == [3, 3]
    assert len(bench.alternate(contenders, CPU, 2, 5, seconds=0)["a"]) == 2
    assert len(bench.alternate(contenders, CPU, 2, 5)["a"]) == 5


def test_seconds_are_taken_or_are_the_contenders_own():
    times = bench.alternate({"sleeps": lambda: time.sleep(0.02), "says": lambda: 7.0}, CPU, 2, 2, warm=False)
    assert (times["sleeps"] >= 0.02).all() and (times["sleeps"] < 2).all() and (times["says"] == 7).all()


def test_a_ratio_above_1_means_that_ours_is_faster():
    ours, theirs = np.array([1.0, 2.0, 1.0]), np.array([3.0, 4.0, 5.0])
    mine, rival, other = bench.rows_of("", {"o": ours, "t": theirs, "u": ours}, 3.0)
    assert "ratio" not in mine and mine["median"] == 1 and (mine["low"], mine["high"]) == (1, 2)
    assert (rival["ratio"], rival["target"], rival["met"]) == (3, "ratio >= 3", True)  # of each turn: 3, 2, 5
    assert other["ratio"] == 1 and "target" not in other
    rates = bench.rows_of("", {"o": ours, "t": theirs}, 3.1, images=60)
    assert [row["median"] for row in rates] == [60, 15] and rates[1]["met"] is False and rates[1]["ratio"] == 3


def test_a_part_that_fails_leaves_its_last_table(tmp_path, monkeypatch):
    def fails(*_):
        yield [{"what": OURS, "setting": "", "median": 1.0}]
        raise ValueError("no")

    (tmp_path / "loss.csv").write_text("as it was")
    monkeypatch.setattr(bench_training, "loss", fails)
    with pytest.raises(ValueError, match="no"):
        bench.bench(["loss"], tmp_path, "cpu", True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["as it was"]


def test_peak_memory_is_that_of_one_call_in_a_process_of_its_own():
    small, large = (bench.fresh_peak("loss", OURS, CPU, (size, 8), False) for size in (256, 2048))
    assert large > 4 and 0 <= small < large < 2000


def test_a_quick_run_does_not_overwrite_the_results(tmp_path, monkeypatch):
    places = []

    def bench_into(parts, out, *_):
        places.append(out)
        return pd.DataFrame(columns=COLUMNS)

    monkeypatch.setattr(bench, "bench", bench_into)
    for given in (["--quick"], [], ["--quick", "--out", str(tmp_path)]):
        bench.run(arguments(*given))
    assert places[0] == bench.data_dir() / "bench" and places[2] == tmp_path
    assert places[1] == bench.repository() / "benchmarks" / "results"
