"""Training obeys its recipe, is the same after any death, and leaves everything else as it was."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import FlatNetwork, LinearNetwork, PoolingNetwork, TokenNetwork, untouched
from weakspot import L2, Linf, attacks, defenses
from weakspot._checks import ModelWarning
from weakspot._io.locks import LockedError, locked
from weakspot.classifier import Classifier
from weakspot.datasets import from_tensors, read_labeled
from weakspot.training import data as finding
from weakspot.training import fit
from weakspot.training import loop as loops
from weakspot.training.adversary import perturbed
from weakspot.training.config import RECIPES, Settings, find_recipe
from weakspot.training.data import HeldOut, Moves
from weakspot.training.fit import held_out_images, make_fabric, split
from weakspot.training.loop import uniform

pytestmark = pytest.mark.filterwarnings("ignore:.*lightning.*")
QUICK: dict[str, Any] = {"epochs": 2, "steps": 3, "batch_size": 20, "learning_rate": 0.05, "held_out": 20}
UNJUDGED = {**QUICK, "held_out": 0}


def halves(count: int = 200, channels: int = 1, size: tuple[int, int] = (16, 12)) -> tuple[Tensor, Tensor]:
    """Noise, brighter in its upper half (class 1) or its lower."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, *size, generator=generator) * 0.6
    labels = torch.arange(count) % 2
    rows = torch.arange(size[0]) < size[0] // 2
    images += 0.3 * (rows[:, None] == (labels == 1)[:, None, None, None])
    return images, labels


def fresh(build: Callable[[], nn.Module] = FlatNetwork) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()])


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "standard"])
def test_a_share_of_nothing_is_standard_training_bit_for_bit(recipe: str) -> None:
    data = halves()
    standard = defenses.train(fresh(), data, recipe="standard", **QUICK)
    nothing = defenses.train(fresh(), data, recipe=recipe, fraction=0.0, **QUICK)
    assert torch.equal(weights(standard), weights(nothing))
    some = defenses.train(fresh(), data, recipe=recipe, fraction=0.5, **QUICK)
    assert not torch.equal(weights(standard), weights(some))


@pytest.mark.parametrize("build", [FlatNetwork, PoolingNetwork, TokenNetwork], ids=lambda b: b.__name__)
def test_network_data_and_random_numbers_come_back_untouched_and_a_seed_gives_one_result(
    build: Callable[[], nn.Module],
) -> None:
    channels = 1 if build is FlatNetwork else 3
    images, labels = halves(60, channels, (16, 24) if build is TokenNetwork else (16, 12))
    model = fresh(build)
    model.train()
    trained = []
    for seed, draws in ((0, 0), (0, 5), (1, 0)):
        torch.rand(draws)  # what was drawn before a training is nothing to it
        with untouched(model, images, labels):
            trained.append(
                defenses.train(
                    model,
                    (images, labels),
                    recipe="full",
                    budget=Linf(0.1),
                    seed=seed,
                    **UNJUDGED,
                )
            )
    assert torch.equal(weights(trained[0]), weights(trained[1]))
    assert not torch.equal(weights(trained[0]), weights(trained[2]))
    assert type(trained[0]) is type(model)
    assert trained[0].training


class Dropping(nn.Module):
    """Batch-norm and dropout, which a resumed training must meet as it left them; returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(8 * 8 * 6, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, int]:
        return self.head(self.body(images)), 0


@pytest.mark.parametrize("recipe", ["localized", "random_mask", "trades"])
def test_a_training_cut_off_anywhere_goes_on_to_the_same_weights(recipe: str, tmp_path: Path) -> None:
    data = halves()
    options = {**QUICK, "epochs": 3, "augment": "crop,flip", "recipe": recipe}
    whole = defenses.train(fresh(Dropping), data, **options)
    options["save_every"] = 0.0  # after every update, so that each cut is in the middle of an epoch
    rows: list[dict[str, float]] = []
    for cut in (0.34, 0.5, 0.97):

        def interrupt(done: float, cut: float = cut) -> None:
            if done >= cut:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            defenses.train(fresh(Dropping), data, out=tmp_path / "run", progress=interrupt, **options)
    resumed = defenses.train(fresh(Dropping), data, out=tmp_path / "run", on_epoch=rows.append, **options)
    assert torch.equal(weights(whole), weights(resumed))
    assert [row["epoch"] for row in rows] == [3]
    record = json.loads((tmp_path / "run/training.json").read_text())
    assert record["finished"]
    assert [row["epoch"] for row in record["epochs"]] == [1, 2, 3]
    assert {
        path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith("backgrounds")
    } == {
        "model.safetensors",
        "training.json",
    }
    # Finished is finished: called again, it is read and not trained.
    assert torch.equal(
        weights(defenses.train(fresh(Dropping), data, out=tmp_path / "run", **options)), weights(whole)
    )


class Striking(nn.Module):
    """Is interrupted in the middle of an update, when batch-norm has moved and the weights have not."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.body, self.at, self.calls = Dropping(), at, 0
        self.average: Tensor
        self.register_buffer("average", torch.zeros(2), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits, _ = self.body(images)
        if self.training:
            self.calls += 1
            self.average.copy_(0.9 * self.average + 0.1 * logits.detach().mean(0))
            if self.calls == self.at:
                signal.raise_signal(signal.SIGINT)
        moved: Tensor = logits + random.random() + 0.01 * self.average  # noqa: S311 - a network that draws
        return moved


@pytest.mark.parametrize("at", [1, 7, 9, 10])
def test_ctrl_c_in_the_middle_of_an_update_waits_for_its_end(at: int, tmp_path: Path) -> None:
    data = halves()
    handler = signal.getsignal(signal.SIGINT)
    before = random.getstate()
    whole = defenses.train(fresh(lambda: Striking(-1)), data, recipe="full", **QUICK)
    with pytest.raises(KeyboardInterrupt):
        defenses.train(
            fresh(lambda: Striking(at)), data, recipe="full", out=tmp_path, save_every=1e9, **QUICK
        )
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["epoch"] * 9 + state["update"] == at
    resumed = defenses.train(fresh(lambda: Striking(-1)), data, recipe="full", out=tmp_path, **QUICK)
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(whole.average, resumed.average)  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is handler
    assert random.getstate() == before
    assert all(weight.grad is None for weight in resumed.parameters())


KILLED = """
import sys, torch
from pathlib import Path
from tests.defenses.test_training import Dropping, fresh, halves
from weakspot import defenses
torch.set_num_threads(1)
defenses.train(
    fresh(Dropping), halves(), recipe="localized", epochs=4, steps=40, batch_size=20, learning_rate=0.05, held_out=20,
    out=Path(sys.argv[1]), save_every=0.05,
)
"""


@pytest.mark.slow
def test_a_training_killed_at_random_moments_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", KILLED, str(out)], cwd=root, stderr=subprocess.DEVNULL)

    def saved(out: Path) -> float:
        path = out / "checkpoint.pt"
        return path.stat().st_mtime if path.exists() else 0.0

    assert start(tmp_path / "whole").wait() == 0
    generator = torch.Generator().manual_seed(0)
    killed = 0
    for _ in range(6):
        process = start(tmp_path / "cut")
        before = saved(tmp_path / "cut")
        while process.poll() is None and saved(tmp_path / "cut") == before:
            time.sleep(0.01)
        time.sleep(float(torch.rand((), generator=generator)) * 0.3)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert start(tmp_path / "cut").wait() == 0
    assert killed >= 3
    for name in ("model.safetensors",):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_noise_is_uniform_in_every_place_and_of_any_shape() -> None:
    noise = uniform((512, 3, 5, 7), torch.Generator().manual_seed(0))
    assert noise.shape == (512, 3, 5, 7)
    assert bool(((noise >= -1) & (noise < 1)).all())
    flat = noise.flatten(1)
    deviation = 1 / 3**0.5 / 512**0.5
    assert bool((flat.mean(0).abs() < 5 * deviation).all())
    assert bool((flat.std(0) - 3**-0.5).abs().max() < 0.06)
    assert float(flat.unique().numel()) > 0.5 * 2**16  # all bits are drawn
    together = torch.corrcoef(flat.T) - torch.eye(flat.shape[1])
    assert float(together.abs().max()) < 0.25  # of 105 places, none tells of another
    assert torch.equal(noise, uniform((512, 3, 5, 7), torch.Generator().manual_seed(0)))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["full", "localized", "random_mask", "noise"])
def test_two_processes_give_what_one_gives(recipe: str, tmp_path: Path) -> None:
    script = tmp_path / "both.py"
    script.write_text(
        "import atexit, sys, torch\n"
        "from pathlib import Path\n"
        "from tests.defenses.test_training import QUICK, fresh, halves\n"
        "from weakspot import defenses\n"
        "atexit.register(lambda: print('joined:', torch.distributed.is_initialized()))\n"  # the last thing done
        f"defenses.train(fresh(), halves(), recipe={recipe!r}, out=Path(sys.argv[1]), **QUICK)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command, out in (([sys.executable], "one"), (launch, "two")):
        ended = subprocess.run(
            [*command, str(script), str(tmp_path / out)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        assert "joined: False" in ended.stdout
        assert "joined: True" not in ended.stdout
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_keep_one_set_of_statistics_and_go_on_with_it(tmp_path: Path) -> None:
    """Each moves its own batch-norm; the adversary, the checkpoint and what is returned are the first one's for all."""
    script = tmp_path / "both.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tests.defenses.test_training import Dropping, fresh, halves, weights\n"
        "from weakspot import defenses\n"
        "def told(row):\n"
        "    if row['epoch'] == 1 and sys.argv[2] == 'die':\n"
        "        os._exit(3)\n"
        "made = defenses.train(fresh(Dropping), halves(), recipe='full', epochs=3, steps=3, batch_size=20,\n"
        "    learning_rate=0.05, held_out=20, out=Path(sys.argv[1]), told=told)\n"
        "Path(sys.argv[1], 'rank' + os.environ['RANK']).write_bytes(weights(made).numpy().tobytes())\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for out, mode, code in (("whole", "live", 0), ("cut", "die", 1), ("cut", "live", 0)):
        command = [*launch, str(script), str(tmp_path / out), mode]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == code, ended.stderr[-2000:]
    found = {(tmp_path / out / f"rank{rank}").read_bytes() for out in ("whole", "cut") for rank in range(2)}
    assert len(found) == 1


def settings(**changes: Any) -> Settings:
    numbers: dict[str, Any] = {
        "recipe": "full", "budget": Linf(0.1), "fraction": 0.5, "epochs": 1, "seed": 0, "steps": 8, "step_size": 0.03,
        "batch_size": 6, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0, "beta": 6.0, "augment": "none",
        "held_out": 0, "precision": "32-true",
    }  # fmt: skip
    return Settings(**{**numbers, **changes})


@pytest.mark.parametrize("inside", [False, True], ids=["everywhere", "in a region"])
@pytest.mark.parametrize("budget", [Linf(0.1), L2(0.7)], ids=str)
def test_the_adversary_reaches_the_optimum_of_a_linear_network_inside_its_region(
    budget: Linf | L2, inside: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 6, 5, generator=generator)
    images = torch.rand(6, 2, 6, 5, generator=generator) * 0.2 + 0.4
    noise = torch.rand(images.shape, generator=generator) * 2 - 1
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    region = torch.rand(6, 1, 6, 5, generator=generator) < 0.5 if inside else None
    where = torch.ones(6, 1, 6, 5, dtype=torch.bool) if region is None else region
    numbers = settings(budget=budget, steps=60, step_size=budget.eps / 6)
    with untouched(model := LinearNetwork(weight), images):
        found = perturbed(model, images, labels, region, noise, find_recipe("full"), numbers)
    downhill = torch.where(labels[:, None, None, None] == 0, -1.0, 1.0) * weight * where
    best = downhill.sign() * budget.eps
    if isinstance(budget, L2):
        best = budget.eps * downhill / downhill.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(found, images + best, rtol=0, atol=2e-3)
    assert torch.equal(found.where(~where, images), images), "outside the region nothing changes, bit for bit"


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.search != "none"])
@pytest.mark.parametrize("budget", [Linf(0.1), L2(0.7)], ids=str)
def test_every_search_stays_in_budget_range_and_region(name: str, budget: Linf | L2) -> None:
    model = fresh().eval()
    images, labels = halves(8)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    region = torch.zeros(8, 1, 16, 12, dtype=torch.bool)
    region[..., 3:9, 2:7] = True
    found = perturbed(model, images, labels, region, noise, find_recipe(name), settings(budget=budget))
    assert bool((found != images).any())
    assert torch.equal(found.where(~region, images), images)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert float(budget.distance(found - images, images).max()) <= budget.eps * (1 + 1e-5)


def test_descent_finds_what_pgd_of_the_attacks_finds() -> None:
    images, labels = halves(60)
    model = defenses.train(fresh(), (images, labels), recipe="standard", **QUICK).eval()
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    numbers = settings(budget=Linf(0.03), steps=40, step_size=0.003)
    found = perturbed(model, images, labels, None, noise, find_recipe("full"), numbers)
    fooled = model(found).argmax(1) != labels
    other = attacks.pgd(model, images, labels, budget=Linf(0.03), steps=40).success
    assert 5 < int(other.sum()) < 60
    assert abs(int(fooled.sum()) - int(other.sum())) <= 2


def test_masks_are_cropped_and_flipped_with_their_images() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 3, 16, 24, generator=generator) + 0.1
    masks = images[:, :1] > 0.6
    rows = torch.randperm(50, generator=generator)[:20]
    moves = Moves("crop,flip", 50, (16, 24), 0, 3)
    moved = moves.apply(rows, images[rows])
    followed = moves.apply(rows, masks[rows].byte(), fill=1).bool()
    outside = moved[:, :1] == 0
    assert torch.equal(followed, (moved[:, :1] > 0.6) | outside)
    assert 0.02 < float(outside.float().mean()) < 0.2
    # By brute force: every image is one of its own shifts, mirrored or not, and which depends on no other image.
    for number, row in enumerate(rows.tolist()):
        down, right = moves.shifts[row].tolist()
        picture = F.pad(images[row], (3, 3, 2, 2))
        own = picture[:, 2 + down : 18 + down, 3 + right : 27 + right]
        own = own.flip(2) if moves.flips[row] else own
        assert torch.equal(moved[number], own)
    alone = moves.apply(rows[3:4], images[rows[3:4]])
    assert torch.equal(alone, moved[3:4])
    assert len({tuple(shift) for shift in moves.shifts.tolist()}) > 15
    assert not torch.equal(moves.shifts, Moves("crop,flip", 50, (16, 24), 0, 4).shifts)


@pytest.mark.parametrize("recipe", ["localized", "foreground", "random_mask"])
def test_in_a_training_each_image_meets_its_own_mask(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through split, shuffle, crop and flip: the mask that the adversary gets is that of the image that it gets."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(80, 1, 16, 24)
    images[..., 5:11, 7:17] = (
        torch.rand(80, 1, 6, 10, generator=generator) > 0.7
    ).float()  # crops never cut it
    seen: list[tuple[Tensor, Tensor]] = []

    def watching(network: Any, shown: Tensor, labels: Tensor, region: Tensor, *rest: Any) -> Tensor:
        seen.append((shown.clone(), region.clone()))
        return shown

    monkeypatch.setattr(loops, "perturbed", watching)
    defenses.train(
        fresh(lambda: FlatNetwork((16, 24))), (images, torch.arange(80) % 2), recipe=recipe, augment="crop,flip",
        **{**QUICK, "held_out": 8},
    )  # fmt: skip
    assert len(seen) == 2 * 3
    for shown, region in seen:
        background = F.max_pool2d((shown > 0.1).float(), 3, 1, 1) == 0
        if recipe == "random_mask":
            assert torch.equal(region.sum((2, 3)), background.sum((2, 3)))
            assert not torch.equal(region, background)
        else:
            assert torch.equal(region, background if recipe == "localized" else ~background)
    assert not torch.equal(seen[0][1], seen[3][1])


def test_held_out_images_are_never_trained_on_and_judged_in_the_recipe_s_region() -> None:
    rows, kept = split(100, 30)
    assert sorted([*rows.tolist(), *kept.tolist()]) == list(range(100))
    assert len(kept) == 10, "at most a tenth"
    data = from_tensors(*halves(100))
    found = finding.find_backgrounds(data)
    masks = found.masks(kept)
    regions = {
        region: held_out_images(data, kept, None if region == "everywhere" else found, region, 0)
        for region in ("everywhere", "background", "foreground", "random")
    }
    assert all(held is not None and torch.equal(held.labels, data.labels[kept]) for held in regions.values())
    assert regions["everywhere"].region is None  # type: ignore[union-attr]
    assert torch.equal(regions["background"].region, masks)  # type: ignore[union-attr, arg-type]
    assert torch.equal(regions["foreground"].region, ~masks)  # type: ignore[union-attr, arg-type]
    assert torch.equal(regions["random"].region.sum((2, 3)), masks.sum((2, 3)))  # type: ignore[union-attr]
    assert held_out_images(data, kept[:0], found, "background", 0) is None


def test_updates_are_those_of_sgd_with_decay_along_the_cosine() -> None:
    images, labels = halves(60)
    trained = defenses.train(
        fresh(),
        (images, labels),
        recipe="standard",
        **{**UNJUDGED, "epochs": 2, "batch_size": 60, "weight_decay": 0.3},
    )
    twin = fresh()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=0.3)
    for rate in (0.05, 0.025):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(twin(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(trained.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


def test_single_step_and_trades_begin_where_their_papers_say() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 6, 5, generator=generator)
    images, labels = torch.full((4, 1, 6, 5), 0.5), torch.tensor([0, 1, 0, 1])
    noise = torch.rand(images.shape, generator=generator) * 2 - 1
    uphill = torch.where(labels[:, None, None, None] == 0, -1.0, 1.0) * weight.sign()
    found = perturbed(
        LinearNetwork(weight), images, labels, None, noise, find_recipe("fast"), settings(steps=9)
    )
    torch.testing.assert_close(found, images + (0.1 * noise + 1.25 * 0.1 * uphill).clamp(-0.1, 0.1))
    starts: list[Tensor] = []

    def network(given: Tensor) -> Tensor:
        starts.append(given.detach())
        logits: Tensor = LinearNetwork(weight)(given)
        return logits

    perturbed(network, images, labels, None, noise, find_recipe("trades"), settings(steps=1))
    torch.testing.assert_close(starts[1], images + 1e-3 * noise)


class Watched(nn.Module):
    """Keeps every batch that it is shown, and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.flat = nn.BatchNorm2d(1), nn.Flatten()
        self.head = nn.Linear(16 * 12, 2)
        self.seen: list[tuple[bool, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((self.training, images.detach().clone()))
        logits: Tensor = self.head(self.flat(self.norm(images)))
        return logits


def loop_of(model: nn.Module, recipe: str, masks: Tensor, **changes: Any) -> loops.Loop:
    import numpy as np

    numbers = settings(recipe=recipe, batch_size=20, steps=3, **changes)
    bits = np.packbits(masks.flatten(1).numpy(), axis=1)
    data = from_tensors(*halves(40))
    kept = (
        finding.Backgrounds(bits, (16, 12)) if recipe in {"localized", "foreground", "random_mask"} else None
    )
    with torch.random.fork_rng():
        return loops.Loop(make_fabric("cpu", "32-true"), Classifier(model), data, kept, None, numbers, 0)


@pytest.mark.parametrize("recipe", ["localized", "foreground", "random_mask", "full", "fast"])
def test_the_adversary_costs_its_steps_moves_no_statistics_and_alters_only_where_the_recipe_says(
    recipe: str,
) -> None:
    masks = torch.zeros(40, 1, 16, 12, dtype=torch.bool)
    masks[..., :5, :] = True
    model = Watched()
    loop = loop_of(model, recipe, masks)
    with torch.random.fork_rng():
        batches = list(loop._batches())
        rows, pixels, places, moves = batches[0]
        before = {name: tensor.clone() for name, tensor in model.norm.state_dict().items()}
        clean = pixels[:10]
        adversarial = loop._attacked(rows[:10], clean, loop.data.labels[rows[:10]], places[:10], moves)
    steps = 1 if recipe == "fast" else 3
    assert [mode for mode, _ in model.seen] == [False] * steps
    assert sum(len(images) for _, images in model.seen) == 10 * steps
    assert model.training
    assert model.norm.training
    torch.testing.assert_close(model.norm.state_dict(), before, rtol=0, atol=0)
    changed = (adversarial != clean).any(1, keepdim=True)
    allowed = {"localized": masks[:10], "foreground": ~masks[:10]}.get(recipe)
    if allowed is not None:
        assert not bool((changed & ~allowed).any())
        assert float((changed & allowed).float().sum() / allowed.float().sum()) > 0.9
    if recipe == "random_mask":
        area = int(masks[0].sum())
        assert int(changed.flatten(1).sum(1).max()) <= area
        assert int(changed.flatten(1).sum(1).min()) >= 0.9 * area
        assert float((changed & masks[:10]).float().sum() / changed.float().sum()) < 0.6, "scattered"
        assert len({tuple(map(int, mask.flatten())) for mask in changed}) > 1
    if recipe in {"full", "fast"}:
        assert float(changed.float().mean()) > 0.9


def test_trades_is_its_formula_by_hand() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16 * 12, 2))
    data = halves(40)
    kept: list[tuple[Tensor, Tensor]] = []
    loop = loop_of(model, "trades", torch.zeros(40, 1, 16, 12, dtype=torch.bool), beta=4.0, fraction=0.5)
    real = loop._attacked

    def watching(rows: Tensor, images: Tensor, labels: Tensor, places: Tensor, moves: Moves) -> Tensor:
        made = real(rows, images, labels, places, moves)
        kept.append((images, made))
        return made

    loop._attacked = watching  # type: ignore[method-assign]
    with torch.random.fork_rng():
        rows, pixels, places, moves = next(loop._batches())
        wanted_clean = model(data[0][rows]).log_softmax(1).detach()
        weight, bias = (tensor.detach().clone() for tensor in model[1].parameters())
        loss = loop._step(rows, pixels, places, moves)
    clean, made = kept[0]
    wanted = (clean.flatten(1) @ weight.T + bias).softmax(1)
    given = (made.flatten(1) @ weight.T + bias).softmax(1)
    gap = (wanted * (wanted / given).log()).sum() / 20
    cross = -wanted_clean.gather(1, data[1][rows][:, None]).mean()
    assert loss == pytest.approx(float(cross + 4.0 * gap), rel=1e-4)
    assert float(gap) > 1e-4


# A network that has learned to leave the background alone has no gradient there, which an attack remarks.
@pytest.mark.filterwarnings("ignore:.*is zero everywhere in the region")
def test_training_helps_against_a_planted_weakness_and_only_there() -> None:
    """The object says the class, the background too: attacks there undo a network that listens to it."""
    generator = torch.Generator().manual_seed(0)
    count = 400
    labels = torch.arange(count) % 2
    sign = (labels * 2 - 1)[:, None, None, None]
    images = torch.full((count, 1, 16, 12), 0.05)
    images[..., 4:12, 3:9] = 0.5 + sign * 0.06 + 0.3 * torch.randn(count, 1, 8, 6, generator=generator)
    images[..., :3, :] = 0.05 + 0.08 * (sign > 0)
    images = images.clamp(0, 1)
    accuracy = {}
    masks = images.new_zeros(count, 1, 16, 12, dtype=torch.bool)
    masks[..., :3, :] = masks[..., 13:, :] = True
    for recipe in ("standard", "localized"):
        options = {**QUICK, "epochs": 16, "learning_rate": 0.03}
        model = defenses.train(fresh(), (images, labels), recipe=recipe, budget=Linf(0.1), **options).eval()
        attacked = attacks.pgd(model, images, labels, budget=Linf(0.1), region=masks).adversarial
        accuracy[recipe] = float((model(attacked).argmax(1) == labels).float().mean())
    assert accuracy["localized"] > 0.8
    assert accuracy["standard"] < 0.5


def test_training_stops_where_robustness_is_lost_and_returns_the_best_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = iter(
        [{"clean": 0.9, "robust": 0.6}, {"clean": 0.9, "robust": 0.85}, {"clean": 0.99, "robust": 0.02}]
    )
    at: list[Tensor] = []

    def judge(self: Any, classifier: Classifier, numbers: Settings) -> dict[str, float]:
        at.append(weights(classifier.network))
        return next(told)

    monkeypatch.setattr(HeldOut, "judge", judge)
    monkeypatch.setattr(loops, "ENOUGH", 20)
    with pytest.warns(ModelWarning, match="fell to 2% in epoch 3"):
        trained = defenses.train(fresh(), halves(), recipe="fast", **{**QUICK, "epochs": 5})
    assert len(at) == 3
    assert torch.equal(weights(trained), at[1])


def test_the_best_weights_survive_a_death(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at: list[Tensor] = []
    told = iter([0.6, 0.85, 0.8, 0.02])

    def judge(self: Any, classifier: Classifier, numbers: Settings) -> dict[str, float]:
        at.append(weights(classifier.network))
        return {"clean": 0.9, "robust": next(told)}

    def die(row: dict[str, float]) -> None:
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(HeldOut, "judge", judge)
    monkeypatch.setattr(loops, "ENOUGH", 20)
    options = {**QUICK, "epochs": 6}
    with pytest.raises(KeyboardInterrupt):
        defenses.train(fresh(), halves(), recipe="fast", out=tmp_path, on_epoch=die, **options)
    for _ in range(2):  # trained to its end, and read again
        with pytest.warns(ModelWarning, match="fell to 2% in epoch 4"):
            trained = defenses.train(fresh(), halves(), recipe="fast", out=tmp_path, **options)
        assert torch.equal(weights(trained), at[1])


class Unlike(nn.Module):
    """Weights that two modules share, a frozen batch-norm and a module that computes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.one = nn.Linear(16 * 12, 16 * 12)
        self.two = self.one
        self.rectify = nn.ReLU(inplace=True)
        self.head = nn.Linear(16 * 12, 2)

    def forward(self, images: Tensor) -> Tensor:
        flat = self.norm(images).flatten(1)
        logits: Tensor = self.head(self.rectify(self.two(self.rectify(self.one(flat)))))
        return logits


def test_shared_weights_are_written_and_frozen_norms_stay_frozen(tmp_path: Path) -> None:
    model = fresh(Unlike).train()
    model.norm.eval()  # type: ignore[union-attr]
    images, labels = halves(60)
    images.requires_grad_()
    trained = [
        defenses.train(
            model, (images, labels), recipe="full", out=tmp_path, **{**UNJUDGED, "learning_rate": 0.01}
        )
        for _ in range(2)
    ]
    assert torch.equal(weights(trained[0]), weights(trained[1]))
    for made in trained:
        assert made.one is made.two
        assert made.training
        assert not made.norm.training  # type: ignore[union-attr]
        assert torch.equal(made.norm.running_mean, model.norm.running_mean)  # type: ignore[union-attr, arg-type]
    assert images.grad is None


def test_half_precision_learns_too() -> None:
    images, labels = halves(400)
    trained = defenses.train(
        fresh(),
        (images, labels),
        recipe="full",
        budget=Linf(0.02),
        **{**QUICK, "epochs": 6, "precision": "bf16-mixed"},
    ).eval()
    assert next(trained.parameters()).dtype == torch.float32
    whole = defenses.train(
        fresh(), (images, labels), recipe="full", budget=Linf(0.02), **{**QUICK, "epochs": 6}
    )
    assert not torch.equal(weights(trained), weights(whole))
    assert float((trained(images).argmax(1) == labels).float().mean()) > 0.95


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"recipe": "localizd"}, "recipe must .* got 'localizd' .did you mean 'localized'"),
        ({"fraction": 1.5}, "fraction is 1.5; accepted is a number from 0 to 1"),
        ({"fraction": float("nan")}, "fraction is nan"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 500}, "batch_size is 500; there are 180 images to train on"),
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"augment": "rotate"}, "augment must .* got 'rotate'"),
        ({"precision": "8"}, "precision must .* got '8'"),
        ({"budget": 0.1}, "budget must .* got 0.1"),
        ({"seed": 0.5}, "seed must .* got 0.5"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"recipe": ["full"]}, "recipe must .* got \\['full'\\]"),
        ({"steps": "3"}, "steps is '3'"),
        ({"out": 3}, "out is 3"),
        ({"workers": -1}, "workers is -1"),
        ({"about": {"settings": 1}}, "about has 'settings'"),
        ({"about": {"path": Path()}}, "about cannot be written as JSON"),
        ({"learning_rate": 1e30}, "the training diverged in epoch 1: learning_rate is 1e.30"),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        defenses.train(fresh(), halves(), **{**QUICK, "recipe": "full", **arguments})


def test_bad_data_and_another_training_in_the_folder_are_told(tmp_path: Path) -> None:
    images, labels = halves()
    for data, said in (
        (images, "data is a Tensor"),
        ((images, labels[:5]), "labels must"),
        ((images * 3, labels), "images span"),
        ((images[:, 0], labels), r"accepted is a tensor \(N, C, H, W\)"),
    ):
        with pytest.raises(ValueError, match=said):
            defenses.train(fresh(), data, **QUICK)  # type: ignore[arg-type]
    defenses.train(fresh(), (images, labels), recipe="standard", out=tmp_path, **QUICK)
    with pytest.raises(ValueError, match=r"other settings \(recipe is standard there, full here\)"):
        defenses.train(fresh(), (images, labels), recipe="full", out=tmp_path, **QUICK)
    with pytest.raises(ValueError, match="other data"):
        defenses.train(fresh(), (images, 1 - labels), recipe="standard", out=tmp_path, **QUICK)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        other = FlatNetwork()
    with pytest.raises(ValueError, match="other start"):
        defenses.train(other, (images, labels), recipe="standard", out=tmp_path, **QUICK)
    changed = images.clone()
    changed[7] = 1 - changed[7]
    for model, data, more, said in (
        (Classifier.wrap(fresh(), mean=[0.5], std=[0.5]), (images, labels), {}, "other start"),
        (fresh(), (changed, labels), {}, "other data"),
        (fresh(), (images, labels), {"budget": L2(1.0000004)}, "other settings"),
    ):
        with pytest.raises(ValueError, match=said):
            defenses.train(model, data, recipe="standard", out=tmp_path, **{**QUICK, **more})
    content = (tmp_path / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044 == (
        tmp_path / "training.json"
    ).stat().st_mode & 0o044
    for damage in (b"", content[:-4] + b"\0\0\0\1", None):
        (tmp_path / "model.safetensors").unlink()
        if damage is not None:
            (tmp_path / "model.safetensors").write_bytes(damage)
        else:
            (tmp_path / "model.safetensors").with_suffix(".x").write_bytes(content)
        with pytest.raises(ValueError, match=r"(is damaged|does not hold|is missing).* to begin anew"):
            defenses.train(fresh(), (images, labels), recipe="standard", out=tmp_path, **QUICK)
        (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(ValueError, match=r"training.json is damaged"):
        defenses.train(fresh(), (images, labels), recipe="standard", out=tmp_path, **QUICK)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="which is a file"):
        defenses.train(fresh(), (images, labels), recipe="standard", out=file, **QUICK)


def test_a_second_training_in_the_folder_is_told_who_writes_there_and_the_first_is_as_if_alone(
    tmp_path: Path,
) -> None:
    data, options = halves(), {**QUICK, "recipe": "full", "save_every": 0.0}
    alone = defenses.train(fresh(), data, **options)
    refused = []

    def intrude(row: dict[str, float]) -> None:
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(LockedError, match=f"{tmp_path} is being written by process {os.getpid()} on "):
            defenses.train(fresh(), data, out=tmp_path, **options)
        refused.append(row["epoch"])
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    first = defenses.train(fresh(), data, out=tmp_path, on_epoch=intrude, **options)
    assert refused == [1, 2]
    assert torch.equal(weights(first), weights(alone))
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "training.json"}


def test_a_lock_is_gone_after_any_end_and_one_left_by_the_dead_blocks_nobody(tmp_path: Path) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    data, lock = halves(), tmp_path / "training.lock"
    with pytest.raises(KeyboardInterrupt):
        defenses.train(fresh(), data, recipe="standard", out=tmp_path, progress=interrupt, **QUICK)
    assert (tmp_path / "checkpoint.pt").exists()
    assert not lock.exists()
    torch.save({"format": 0}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="format"):
        defenses.train(fresh(), data, recipe="standard", out=tmp_path, **QUICK)
    assert not lock.exists()
    (tmp_path / "checkpoint.pt").unlink()
    lock.write_text(json.dumps({"pid": 1, "host": platform.node(), "since": "yesterday"}))  # nobody holds it
    defenses.train(fresh(), data, recipe="standard", out=tmp_path, **QUICK)
    assert not lock.exists()


def test_a_training_that_another_process_finished_in_the_meantime_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, options = halves(), {**QUICK, "recipe": "full"}
    rows: list[dict[str, float]] = []
    others = []

    @contextmanager
    def late(folder: Path, name: str) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(fit, "locked", locked)
            others.append(defenses.train(fresh(), data, out=tmp_path, **options))
        with locked(folder, name):
            yield

    monkeypatch.setattr(fit, "locked", late)
    made = defenses.train(fresh(), data, out=tmp_path, on_epoch=rows.append, **options)
    assert len(others) == 1
    assert rows == []
    assert torch.equal(weights(made), weights(others[0]))


@pytest.mark.slow
def test_two_processes_of_one_training_take_the_lock_once_and_are_both_refused_where_it_is_held(
    tmp_path: Path,
) -> None:
    script = tmp_path / "both.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tests.defenses.test_training import QUICK, fresh, halves\n"
        "from weakspot import defenses\n"
        "out = Path(sys.argv[1])\n"
        "try:\n"
        "    defenses.train(fresh(), halves(), recipe='full', out=out / 'run', **QUICK)\n"
        "    said = 'trained'\n"
        "except ValueError as error:\n"
        "    said = str(error)\n"
        "(out / ('said' + os.environ['RANK'])).write_text(said)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment["PYTHONPATH"] += os.pathsep + str(Path(defenses.__file__).parents[2])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def said() -> set[str]:
        ended = subprocess.run(
            [*launch, str(script), str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        return {(tmp_path / f"said{rank}").read_text() for rank in range(2)}

    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", "training.lock"):
        (refusal,) = said()
    assert f"is being written by process {os.getpid()} on" in refusal
    assert {path.name for path in (tmp_path / "run").iterdir()} == set()
    assert said() == {"trained"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"model.safetensors", "training.json"}


def test_a_damaged_checkpoint_is_told_and_a_pickle_in_its_place_is_not_run(tmp_path: Path) -> None:
    def interrupt(done: float) -> None:
        if done > 0.6:
            raise KeyboardInterrupt

    data = halves()
    with pytest.raises(KeyboardInterrupt):
        defenses.train(fresh(), data, recipe="standard", out=tmp_path, progress=interrupt, **QUICK)
    (tmp_path / "training.json").unlink()
    with pytest.raises(ValueError, match=r"other settings \(recipe is standard there, full here\)"):
        defenses.train(fresh(), data, recipe="full", out=tmp_path, **QUICK)
    for content in (b"", b"PK\x03\x04 no", b"cos\nsystem\n(S'touch pwned'\ntR."):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint.pt is damaged"):
            defenses.train(fresh(), data, recipe="standard", out=tmp_path, **QUICK)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: FlatNetwork((20, 20)), r"does not take the data's images of 1 x 16 x 12"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).requires_grad_(False),
            "no weights that require grad",
        ),
        (nn.Flatten, "no weights that require gradients"),
    ],
)
def test_networks_that_cannot_be_trained_on_the_data_are_told(
    build: Callable[[], nn.Module], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        defenses.train(build(), halves(), **QUICK)


def test_labels_beyond_the_logits_are_told_and_inference_mode_does_no_harm() -> None:
    images, labels = halves(60)
    with pytest.raises(ValueError, match="labels must be classes between 0 and 1, got 2"):
        defenses.train(fresh(), (images, labels + 1), **QUICK)
    with torch.inference_mode():
        trained = defenses.train(fresh(), (images.clone(), labels), recipe="full", **UNJUDGED)
    assert torch.equal(
        weights(trained), weights(defenses.train(fresh(), (images, labels), recipe="full", **UNJUDGED))
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_are_decoded_alike_by_any_number_of_workers_and_damage_is_told(
    workers: int, tmp_path: Path
) -> None:
    from PIL import Image

    images, _ = halves(40)
    for number, image in enumerate(images):
        folder = tmp_path / "photos" / ("one" if number % 2 else "two")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).byte().numpy()).save(folder / f"{number:02}.png")
    data = read_labeled(tmp_path / "photos", size=(16, 12), channels=1)
    options = {**UNJUDGED, "recipe": "full", "workers": workers}
    trained = defenses.train(fresh(), data, **options)
    again = defenses.train(fresh(), data, **{**options, "workers": 1})
    assert torch.equal(weights(trained), weights(again))
    loop_data = read_labeled(tmp_path / "photos", size=(16, 12), channels=1)

    def damage(row: dict[str, float]) -> None:
        (tmp_path / "photos/one/03.png").write_bytes(b"no picture")

    with pytest.raises(
        ValueError, match=r"one/03.png: not an image in a known format; take it out of the data$"
    ):
        defenses.train(fresh(), loop_data, on_epoch=damage, **{**options, "epochs": 3})


def test_without_fabric_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(ValueError, match=r"pip install 'weakspot\[train\]'"):
        defenses.train(fresh(), halves(), **QUICK)
