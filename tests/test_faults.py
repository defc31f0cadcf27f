# SPDX-License-Identifier: Apache-2.0
"""Faults: saves that are killed, full and read-only disks, files that vanish, many processes and many threads.

`make test-thorough` kills 200 saves, `make test` 15.
"""

import fcntl
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from parts import picture, run_python
from transformers import AutoModelForCausalLM, AutoProcessor

from moellava import load_pretrained_model
from moellava.saving.staging import staged_folder


TESTS = str(Path(__file__).parent)
KILLS = int(os.environ.get("MOELLAVA_KILLS", "15"))
SHARES = {"save": 0.5, "processor": 0.2, "convert": 0.1, "push": 0.1, "push_to_hub": 0.1}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, flock and the exchange of two folders")


@pytest.fixture(scope="module")
def sparse(parts):
    """A sparse model."""
    return load_pretrained_model(
        parts.language_model("llama"),
        vision_tower=parts.vision_tower("clip"),
        moe_config={"num_experts": 4, "layers": "dense", "capacity_factor": 1.5, "eval_capacity_factor": 1.5},
        device="cpu",
    ).model


@pytest.fixture(scope="module")
def checkpoint(sparse, tmp_path_factory) -> Path:
    """The sparse model in one file."""
    folder = tmp_path_factory.mktemp("faults") / "checkpoint"
    sparse.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(sparse, tmp_path_factory) -> Path:
    """The sparse model in many files."""
    folder = tmp_path_factory.mktemp("faults") / "shards"
    sparse.save_pretrained(folder, max_shard_size="200KB")
    return folder


def run_killing(call: str, **options) -> dict:
    """What a call of a function of `killing.py` prints, in a process of its own."""
    output = run_python(f"import killing\nkilling.{call}", env={"PYTHONPATH": TESTS}, **options)
    return json.loads(output.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHARES)
def test_a_killed_save_leaves_the_earlier_checkpoint_or_the_new_one(
    kind, checkpoint, shards, parts, tmp_path, record_property
):
    kills = round(KILLS * SHARES[kind])
    place = "me/model" if kind.startswith("push") else str(tmp_path / "at" / "model")
    sources = {
        "convert": [str(parts.llava_hf()), str(parts.llava_hf("siglip"))],
        "push": [str(checkpoint), str(shards)],
    }.get(kind, [str(checkpoint)])
    counts = run_killing(f"main({kind!r}, {sources!r}, {place!r}, {kills})", block_moellava=False, timeout=1200)
    assert counts.get("earlier", 0) + counts.get("new", 0) == kills
    record_property("counts", counts)
    logging.getLogger(__name__).info("%s, %d kills: %s", kind, kills, counts)
    if not kind.startswith("push"):
        # The last save, which nobody killed, has removed what the killed ones have left behind.
        assert [path.name for path in (tmp_path / "at").iterdir()] == ["model"]
        assert (tmp_path / "at" / "model" / "notes.txt").read_text() == "the user's own"
        assert type(AutoProcessor.from_pretrained(place)).__name__ == "MoellavaProcessor"
        assert AutoModelForCausalLM.from_pretrained(place).config.image_aspect_ratio in ("pad", "square")


def test_a_killed_save_without_the_package_is_made_good_by_the_next_one(checkpoint, tmp_path):
    place = tmp_path / "at" / "model"
    result = run_killing(f"kill_without_the_package([{str(checkpoint)!r}], {str(place)!r}, 3)")
    assert result["lost"] == []
    assert AutoModelForCausalLM.from_pretrained(place).config.image_aspect_ratio == "pad"


def test_a_killed_save_where_files_are_replaced_leaves_no_mixture(tmp_path):
    """A folder that the process stands in is not swapped: in between it has no config, and can be completed."""
    counts = run_killing(f"kill_where_files_are_replaced({str(tmp_path / 'at' / 'model')!r})", block_moellava=False)
    assert counts["earlier"] == 1
    assert counts["to be completed"] > 5
    assert counts["new"] >= 1


def test_a_killed_save_without_an_exchange_leaves_no_mixture(tmp_path):
    """Between two renames there is no checkpoint; the earlier one lies beside its place, and the next save finds it."""
    counts = run_killing(f"kill_between_two_renames({str(tmp_path / 'at' / 'model')!r})", block_moellava=False)
    assert counts["earlier"] == 1 and counts["put away"] == 1 and counts["new"] > 1


def test_what_killed_saves_leave_behind(tmp_path):
    target = tmp_path / "model"
    dead, alive, others = (tmp_path / f".{name}.saving" for name in ("model.0123456789ab", "model.ba9876543210", "x.0"))
    earlier = tmp_path / ".model.00000000000a.saving.earlier"
    for folder in (dead, alive, others, earlier):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    (earlier / "notes.txt").write_text("mine")
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(OSError, match="disk full"), staged_folder(target):
        # Killed between two renames: the earlier checkpoint comes back before anything else happens.
        assert (target / "config.json").read_text() == earlier.name
        raise OSError("disk full")
    with staged_folder(target) as staging:
        (staging / "config.json").write_text("new")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"config.json": "new", "notes.txt": "mine"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", alive.name, others.name}
    os.close(lock)


def test_the_only_copy_is_kept(tmp_path):
    """Where no checkpoint lies in the target, what a killed save has left may be all that there is."""
    left = tmp_path / ".model.0123456789ab.saving"
    left.mkdir()
    (left / "model.safetensors").write_text("the only one")
    with pytest.raises(OSError, match="disk full"), staged_folder(tmp_path / "model"):
        raise OSError("disk full")
    assert (left / "model.safetensors").read_text() == "the only one"


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


def test_two_processes_save_to_one_folder(checkpoint, tmp_path):
    place = tmp_path / "at" / "model"
    result = run_killing(f"race([{str(checkpoint)!r}], {str(place)!r}, 6)", block_moellava=False)
    assert sum(result["counts"].values()) == 6
    assert result["left"] == ["model"]


COLD = """
import os, time
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel, LlamaModel, MixtralModel
torch.set_num_threads(1)
folder = {folder!r}
children, start = [], time.time() + 0.5
for _ in range(8):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            time.sleep(max(0, start - time.time()))
            model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            status = type(model).__name__ != "MoellavaForCausalLM" or processor.num_image_tokens != 16
        finally:
            os._exit(status)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""


def test_eight_processes_load_at_once_with_a_cold_cache(checkpoint):
    assert json.loads(run_python(COLD.format(folder=str(checkpoint))).splitlines()[-1]) == [0] * 8


# ---------------------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------------------

DISKS = """
import json, os, resource, shutil, subprocess
from pathlib import Path
from moellava import load_pretrained_model
from moellava.saving.staging import staged_folder

model = load_pretrained_model({checkpoint!r}, device="cpu").model
root = Path({root!r})
results = {{}}

def files(folder):
    return {{str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}}

def attempt(name, folder, **options):
    before = files(folder)
    try:
        model.save_pretrained(folder, **options)
        results[name] = ["saved", sorted(path.name for path in folder.iterdir())]
    except Exception as error:
        results[name] = [type(error).__name__, str(error)]
    results[name + " unchanged"] = files(folder) == before
    results[name + " left"] = [str(path.relative_to(root)) for path in root.rglob("*.saving*")]

def mount(*arguments):
    subprocess.run(["mount", *map(str, arguments)], check=True)

plain = root / "plain"
model.save_pretrained(plain)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
attempt("too large", plain)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
if {mounts}:
    size = sum(len(content) for content in files(plain).values())
    disk = root / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", f"size={{int(size * 1.5)}}", "tmpfs", disk)
    model.save_pretrained(disk / "model")
    attempt("full", disk / "model")
    attempt("full, new", disk)
    mount("-o", "remount,ro", disk)
    attempt("read-only", disk / "model")
    point = root / "point"
    point.mkdir()
    mount("-t", "tmpfs", "tmpfs", point)
    attempt("mount point", point)
    attempt("mount point, shards", point, max_shard_size="200KB")
    mount("--bind", root / "plain" / "README.md", point / "tokenizer.json")
    attempt("held file", point)
    for name in ("upper", "work", "merged"):
        (root / name).mkdir()
    (root / "lower").mkdir()
    shutil.copytree(plain, root / "lower" / "model")
    (root / "lower" / "model" / "notes.txt").write_text("mine")
    mount("-t", "overlay", "-o", ",".join(f"{{name}}dir={{root / name}}" for name in ("lower", "upper", "work")),
          "overlay", root / "merged")
    attempt("lower layer", root / "merged" / "model", max_shard_size="200KB")
    load_pretrained_model(root / "merged" / "model", device="cpu")
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def disks(checkpoint, tmp_path_factory) -> dict:
    """What came of saves to disks that are full, read-only, or of a kind where folders cannot be swapped."""
    root = tmp_path_factory.mktemp("disks")
    unshare = shutil.which("unshare")
    mounts = unshare is not None and subprocess.run([unshare, "-m", "true"], capture_output=True).returncode == 0
    script = root / "script.py"
    script.write_text(DISKS.format(checkpoint=str(checkpoint), root=str(root / "at"), mounts=mounts))
    (root / "at").mkdir()
    command = [*([unshare, "-m"] if mounts else []), sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=3000)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def of_disk(disks: dict, name: str) -> list:
    if name not in disks:
        pytest.skip("needs the right to mount a file system, as root has it")
    return disks[name]


@pytest.mark.parametrize("case", ["too large", "full", "full, new"])
def test_a_full_disk(disks, case):
    kind, text = of_disk(disks, case)
    assert kind == "OSError"
    assert text.startswith("The weights cannot be written to ") and ("os error 28" in text or "os error 27" in text)
    assert disks[f"{case} unchanged"]
    assert disks[f"{case} left"] == []


def test_a_read_only_folder(disks):
    kind, text = of_disk(disks, "read-only")
    assert kind == "PermissionError"
    assert text.endswith("cannot be written to, so nothing is saved there. Give another folder.")
    assert disks["read-only unchanged"]


def test_a_mount_point(disks):
    """Its files are replaced one by one, and weights of the earlier checkpoint do not stay."""
    assert of_disk(disks, "mount point")[0] == "saved"
    outcome, names = disks["mount point, shards"]
    assert outcome == "saved"
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names
    assert disks["mount point, shards left"] == []


def test_a_file_that_cannot_be_replaced(disks):
    kind, text = of_disk(disks, "held file")
    assert kind == "OSError"
    assert "point is incomplete, since " in text and "tokenizer.json could not be replaced (Device or res" in text
    left = disks["held file left"]
    assert len(left) == 1 and text.endswith(f"move what is left in {text.split(' in ')[-1][:-7]} there.")


def test_a_folder_of_a_lower_layer(disks):
    """As one of a container's image: it cannot be renamed."""
    outcome, names = of_disk(disks, "lower layer")
    assert outcome == "saved"
    assert {"notes.txt", "model.safetensors.index.json"} <= set(names) and "model.safetensors" not in names


# What happens when a file is opened, for a hook that cannot be taken away again.
_on_open = threading.local()


def _watch(event: str, arguments: tuple) -> None:
    callback = getattr(_on_open, "callback", None)
    if event == "open" and callback is not None:
        callback(str(arguments[0]))


sys.addaudithook(_watch)


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, lambda path: load_pretrained_model(path).model])
@pytest.mark.parametrize("when", ["before", "while loading"])
def test_a_file_that_is_removed(shards, tmp_path, load, when):
    folder = Path(shutil.copytree(shards, tmp_path / "model"))
    shard = sorted(folder.glob("*.safetensors"))[5]

    def remove(opened: str) -> None:
        if opened == str(folder / "model.safetensors.index.json"):
            shard.unlink(missing_ok=True)

    if when == "before":
        shard.unlink()
    else:
        _on_open.callback = remove
    try:
        with pytest.raises(OSError, match=shard.name):
            load(str(folder))
    finally:
        _on_open.callback = None
    assert not shard.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Many answers
# ---------------------------------------------------------------------------------------------------------------------


def prepared(processor, number: int) -> dict:
    return processor(
        images=picture(number), text=f"USER: <image>\nWhat is picture {number}? ASSISTANT:", return_tensors="pt"
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_answers_take_no_more_memory_than_a_hundred(sparse):
    inputs = prepared(sparse.processor, 0)
    sizes, objects = [], []
    for number in range(1000):
        sparse.generate(**inputs, max_new_tokens=2, do_sample=False)
        if number in (199, 999):
            gc.collect()
            sizes.append(resident_bytes())
            objects.append(len(gc.get_objects()))
    assert objects[1] - objects[0] < 100
    assert sizes[1] - sizes[0] < 12 << 20  # the allocator itself keeps some megabytes more or less


def test_threads_answer_with_one_model(sparse):
    """Padding masks and router logits belong to a pass, so that threads do not get each other's."""
    rows = [prepared(sparse.processor, number) for number in range(8)]

    def answer(inputs: dict) -> tuple[list, list]:
        generated = sparse.generate(**inputs, max_new_tokens=6, do_sample=False)
        with torch.no_grad():
            routed = sparse(**inputs, output_router_logits=True).router_logits
        return generated.tolist(), [logits.tolist() for logits in routed]

    expected = [answer(inputs) for inputs in rows]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            assert list(pool.map(answer, rows)) == expected


def test_saves_are_counted():
    """What `make test-thorough` promises."""
    assert sum(round(200 * share) for share in SHARES.values()) == 200
    assert Counter(round(KILLS * share) > 0 for share in SHARES.values()) == {True: len(SHARES)}
