"""Runs that are killed, resumed, spread over processes, or that diverge."""

import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from dcnv2_d2.checkpoint import Checkpointer, UnreadableCheckpoint
from dcnv2_d2.config import CONFIGS
from dcnv2_d2.engine import Trainer, explain_divergence, launch, plain_errors
from detectron2.config import get_cfg
from detectron2.engine import SimpleTrainer, TrainerBase, default_argument_parser
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.utils.events import EventStorage
from torch import nn
from torch.multiprocessing import ProcessExitedException

QUICK_START = CONFIGS / "quick_start"
FULL = "mask_rcnn_small_mdconv_c3-c5_mdpool_mimic"  # has every part of the package
# DCNV2_NIGHTLY=1: every quick-start config on two and four processes, and more kills
NIGHTLY = bool(os.environ.get("DCNV2_NIGHTLY"))
ARGUMENTS = default_argument_parser().parse_args([])
ITERATIONS = 16 if NIGHTLY else 8  # of a run that is killed; others evaluate
LENGTH = ["SOLVER.MAX_ITER", str(ITERATIONS), "DATASETS.TEST", "()"]
DETECTORS = sorted(path.stem for path in QUICK_START.glob("*.yaml") if "deeplab" not in path.stem)
PROCESSES = [(n, name) for n in (2, 4) for name in DETECTORS] if NIGHTLY else [(2, FULL)]
PATIENCE = 1200  # seconds for a run that takes twenty: a nightly machine is busy
SMALL = [
    *("DATASETS.TRAIN", "('bent_shapes_tiny_train',)", "DATASETS.TEST", "('bent_shapes_tiny_val',)"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.CHECKPOINT_PERIOD", "2", "SEED", "7"),
]


def start(folder, data, *opts, flags=()):
    """Starts training with its output in `folder` and its data sets in `data`."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "dcnv2_d2.train", *flags),
            *("--config-file", str(QUICK_START / f"{FULL}.yaml"), *SMALL, *opts, "OUTPUT_DIR", str(folder)),
        ],
        env={**os.environ, "DETECTRON2_DATASETS": str(data), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


def weights(path):
    return torch.load(path, map_location="cpu")["model"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, data, *LENGTH))
    return folder


@pytest.mark.parametrize("number", range(20 if NIGHTLY else 1))
def test_a_run_killed_at_any_time_ends_with_the_same_weights(number, whole, tmp_path, data):
    """Killed up to a second after one of its checkpoints, and resumed; every other time workers load the images."""
    steps = (*LENGTH, "DATALOADER.NUM_WORKERS", str(2 * (number % 2)))
    iteration = random.randrange(1, ITERATIONS - 2, 2)
    killed = start(tmp_path / "killed", data, *steps)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "killed" / f"model_{iteration:07}.pth").is_file():
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        time.sleep(0.01)
    time.sleep(random.random())
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    output = finish(start(tmp_path / "killed", data, *steps, flags=["--resume"]))
    print("Killed after iteration", iteration, *(resumed := re.findall("Starting training from iteration .*", output)))
    assert resumed and int(resumed[0].split()[-1]) >= iteration - 1  # or killed before the last line of saving
    assert_same_weights(weights(whole / "model_final.pth"), weights(tmp_path / "killed" / "model_final.pth"))


@pytest.mark.parametrize("processes, config", PROCESSES)
def test_processes_agree(tmp_path, data, processes, config):
    """With automatic mixed precision, which on the CPU is turned off, and said to be."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = tmp_path / "check.py"
    script.write_text(CHECK_RANKS)
    output = subprocess.run(
        [sys.executable, *launcher, script, QUICK_START / f"{config}.yaml", *SMALL]
        + ["SOLVER.MAX_ITER", "10", "SOLVER.AMP.ENABLED", "True", "OUTPUT_DIR", tmp_path / "run"],
        env={**os.environ, "DETECTRON2_DATASETS": str(data), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert output.returncode == 0, output.stdout + output.stderr
    assert output.stdout.count("ranks agree") == processes
    assert ("needs a GPU in Detectron2's trainer: training in float32" in output.stderr) != torch.cuda.is_available()


CHECK_RANKS = """
import sys
from dcnv2_d2.train import setup  # before torch
import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from dcnv2_d2.engine import Trainer, launch

def main(args):
    trainer = Trainer(setup(args))
    trainer.resume_or_load(False)
    trainer._hooks = [h for h in trainer._hooks if type(h).__name__ != "EvalHook"]
    trainer.train()
    assert isinstance(trainer.model, torch.nn.parallel.DistributedDataParallel) and trainer.iter == 10
    own = [p.detach() for p in trainer.model.parameters()]
    everyone = comm.all_gather(own)
    assert all(torch.equal(a, b) for other in everyone for a, b in zip(own, other))
    print("ranks agree", flush=True)

launch(main, default_argument_parser().parse_args(["--config-file", *sys.argv[1:]]))
"""


class Counter:
    """Something with a state, to be saved beside the model."""

    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@pytest.fixture
def saved(tmp_path):
    """A folder with three checkpoints of a model whose weight and counter are their number."""
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path), counter=Counter())
    for number in range(3):
        nn.init.constant_(checkpointer.model.weight, number)
        checkpointer.checkpointables["counter"].value = number
        checkpointer.save(f"model_{number}")
        os.utime(tmp_path / f"model_{number}.pth", (number, number))
    return tmp_path


def resume(folder):
    checkpointer = Checkpointer(nn.Linear(1, 1), str(folder), counter=Counter())
    checkpointer.resume_or_load("", resume=True)
    weight, counter = checkpointer.model.weight.item(), checkpointer.checkpointables["counter"].value
    assert weight == counter
    return counter


def test_resume_takes_the_last(saved):
    assert resume(saved) == 2
    assert sorted(p.name for p in saved.iterdir()) == ["last_checkpoint", *(f"model_{i}.pth" for i in range(3))]


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage", "list", "missing"])
def test_resume_passes_over_an_unreadable_checkpoint(saved, damage, caplog):
    last = saved / "model_2.pth"
    content = last.read_bytes()
    last.write_bytes({"truncate": content[: len(content) // 2], "garbage": b"\x80" * 99}.get(damage, b""))
    if damage == "list":
        torch.save([1], last)
    if damage == "missing":
        last.unlink()
    assert resume(saved) == 1
    assert "model_2.pth" in caplog.text and "trying the one before it" in caplog.text


def test_resume_without_a_readable_checkpoint_says_what_to_do(saved):
    for path in saved.glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(RuntimeError, match="none of the checkpoints in .* can be read; start again without --resume"):
        resume(saved)


def test_weights_that_are_asked_for_and_unreadable_are_an_error(saved):
    (saved / "model_1.pth").write_bytes(b"")
    with pytest.raises(UnreadableCheckpoint, match=r"model_1\.pth is not readable"):
        Checkpointer(nn.Linear(1, 1)).load(str(saved / "model_1.pth"))


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    torch.save({"model": {}, "extra": Malicious()}, tmp_path / "model.pth")
    with pytest.raises(UnreadableCheckpoint):
        Checkpointer(nn.Linear(1, 1)).load(str(tmp_path / "model.pth"))
    assert not (tmp_path / "trap").exists()


def test_a_pickle_is_read_with_a_warning(tmp_path, caplog):
    weights = {"weight": np.full((1, 1), 3.0, np.float32), "bias": np.zeros(1, np.float32)}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": weights, "__author__": "somebody"}))
    checkpointer = Checkpointer(nn.Linear(1, 1))
    checkpointer.load(str(tmp_path / "model.pkl"))
    assert checkpointer.model.weight.item() == 3
    assert "can run code while it is read" in caplog.text


def test_a_full_disk_leaves_the_previous_checkpoint(saved, monkeypatch):
    def full(data, file, *args, **kwargs):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    before = (saved / "model_2.pth").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        Checkpointer(nn.Linear(1, 1), str(saved), counter=Counter()).save("model_2")
    assert (saved / "model_2.pth").read_bytes() == before
    assert not list(saved.glob("*unfinished*"))
    assert resume(saved) == 2


def test_the_log_has_a_checkpoint_s_real_name(tmp_path, caplog):
    with caplog.at_level("INFO"):
        Checkpointer(nn.Linear(1, 1), str(tmp_path)).save("model_7")
    assert [r.getMessage() for r in caplog.records] == [f"Saving checkpoint to {tmp_path}/model_7.pth"]


class Interrupted(Trainer):
    """A trainer that is stopped by Ctrl-C in its third iteration."""

    def __init__(self, cfg, model):
        TrainerBase.__init__(self)
        self.cfg = cfg
        self._trainer = SimpleTrainer(model, [None], torch.optim.SGD(model.parameters(), 0.1))
        self.start_iter, self.max_iter = 0, 9
        self.register_hooks(self.build_hooks())

    def build_hooks(self):
        self.checkpointer = Checkpointer(self._trainer.model, self.cfg.OUTPUT_DIR)
        return [PeriodicCheckpointer(self.checkpointer, self.cfg.SOLVER.CHECKPOINT_PERIOD)]

    def run_step(self):
        if self.iter == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("period, sentence", [
    (2, "Stopped in iteration 2. The same command with --resume goes on from {}/model_0000001.pth."),
    (5, "Stopped in iteration 2. There is no checkpoint yet (see SOLVER.CHECKPOINT_PERIOD)."),
])  # fmt: skip
def test_ctrl_c(period, sentence, tmp_path, caplog):
    """Saves nothing more, says how to go on, and ends the command without a traceback."""
    cfg = get_cfg()
    cfg.OUTPUT_DIR, cfg.SOLVER.CHECKPOINT_PERIOD = str(tmp_path), period
    with pytest.raises(SystemExit) as error:
        launch(lambda args: Interrupted(cfg, nn.Linear(1, 1)).train(), ARGUMENTS)
    assert error.value.code == 130 and error.value.__suppress_context__
    assert caplog.records[-1].getMessage() == sentence.format(tmp_path)
    assert [p.name for p in tmp_path.glob("*.pth")] == (["model_0000001.pth"] if period == 2 else [])


def test_ctrl_c_while_saving(saved, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda data, file: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        Checkpointer(nn.Linear(1, 1), str(saved)).save("model_3")
    assert not list(saved.glob("*unfinished*"))
    assert resume(saved) == 2


@pytest.mark.parametrize("gpus", [0, 1])
def test_more_gpus_than_there_are(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    sentence = rf"--num-gpus must be at most the number of GPUs here, {gpus}, got 2\..* torchrun .*--nproc-per-node=2"
    with pytest.raises(SystemExit, match=sentence):
        launch(lambda args: pytest.fail("started"), Namespace(**{**vars(ARGUMENTS), "num_gpus": 2}))


def test_a_process_that_ends_early(monkeypatch):
    def start(*args, **kwargs):
        raise ProcessExitedException("process 1 terminated with signal SIGKILL", 1, 2, -9)

    monkeypatch.setattr("dcnv2_d2.engine.detectron2_launch", start)
    with pytest.raises(SystemExit, match="^Error: process 1 terminated with signal SIGKILL$"):
        launch(None, ARGUMENTS)


def test_mistakes_are_told_without_a_traceback():
    with pytest.raises(SystemExit, match="^Error: KEY must be 1, got 2$"), plain_errors():
        raise ValueError("KEY must be 1, got 2")
    with pytest.raises(KeyError), plain_errors():
        raise KeyError("a bug")


class Diverging(nn.Module):
    """Takes Detectron2's inputs; an image of nines turns infinite in the second layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(1, 1)
        self.second = nn.Linear(1, 1)
        nn.init.ones_(self.first.weight)
        self.second.weight.data.fill_(1e38)

    def forward(self, batch):
        x = torch.stack([record["image"] for record in batch])
        return {"loss": self.second(self.first(x)).sum()}


def test_divergence_names_layer_and_image():
    batch = [{"file_name": f"{i}.jpg", "image": torch.tensor([float(i)])} for i in (1, 9)]
    with EventStorage():
        text = explain_divergence(Diverging(), batch)
    assert "second" in text and "9.jpg" in text and "1.jpg" not in text


class OneStep(Trainer):
    """One step with a batch, under the autocast of an AMPTrainer, which wants a GPU."""

    def __init__(self, model, batch, dtype):
        class Inner(SimpleTrainer):
            def run_step(self):
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = self.model(next(self._data_loader_iter))["loss"]
                self._write_metrics({"loss": loss}, 0.0)

        TrainerBase.__init__(self)
        self._trainer = Inner(model, [batch], torch.optim.SGD(model.parameters(), 0.1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_divergence_is_repeated_under_the_autocast_of_the_step(dtype):
    model = Diverging()
    model.second.weight.data.fill_(3e4)  # 9 times that is too much for float16 alone
    batch = [{"file_name": f"{i}.jpg", "image": torch.tensor([float(i)])} for i in (1, 9)]
    with EventStorage():
        if dtype is torch.float16:
            with pytest.raises(FloatingPointError, match="not finite: second, on the image 9.jpg"):
                OneStep(model, batch, dtype).run_step()
        else:
            OneStep(model, batch, dtype).run_step()


def test_divergence_names_broken_parameters():
    model = Diverging()
    model.first.bias.data.fill_(float("nan"))
    with EventStorage():
        text = explain_divergence(model, [{"file_name": "1.jpg", "image": torch.ones(1)}])
    assert "first.bias" in text and "1.jpg" in text and "clip" in text


def test_a_diverging_run_stops_with_names(tmp_path, data):
    process = start(
        tmp_path, data, "SOLVER.MAX_ITER", "50", "SOLVER.BASE_LR", "1e30", "SOLVER.CLIP_GRADIENTS.ENABLED", "False"
    )
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    error = output[output.index("FloatingPointError") :]
    assert "First layer with an output that is not finite: backbone" in error and ".jpg" in error
