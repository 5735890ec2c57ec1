"""One engine for the three tasks: mmengine's runner, started, resumed, tested and stopped the same way for all."""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import logging
import re
from collections.abc import Collection
from numbers import Real
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from mmengine import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import BaseLoop, CheckpointLoader
from mmengine.runner import Runner as MMRunner
from torch import nn

import hybridzoo.backbones
import hybridzoo.train.early_stop  # noqa: F401 - a hook that configs name
from hybridzoo.checkpoints.containers import flaw
from hybridzoo.checkpoints.transfer import DownloadError, fetch
from hybridzoo.train import (
    config_check,
    hooks,
    interruptions,
    launching,
    optim,
    overrides,
    progress,
    provenance,
    resuming,
    run_folder,
    seeding,
    settle,
    sharding,
    testing,
    trained,
    views,
)
from hybridzoo.train.batchnorm import drop_a_last_one, single_images
from hybridzoo.train.data.holdout import Holdout, holdout_of
from hybridzoo.train.devices import check_device
from hybridzoo.train.errors import UserError, building
from hybridzoo.train.names import TASKS
from hybridzoo.train.tracking import add_tensorboard, add_wandb
from hybridzoo.train.weights import load_matching, read_checkpoint, read_state_dict, tell

T = TypeVar("T")
_runs = itertools.count()


class Runner(MMRunner):
    """mmengine's runner with a quiet terminal, seeded samples and initial weights that have to fit."""

    initial_weights: Path | None = None
    resumed: resuming.State | None = None
    run = ""  # name of the run, which its checkpoints hold
    started = False  # from weights, which they hold too
    sharded = False  # by FSDP
    origin = ""  # where the weights come from, in words
    lineage: tuple[provenance.Start, ...] = ()  # the same with licences, for whoever takes the result
    _train_dataloader: Any

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(log_level, log_file, **kwargs)
        for handler in logger.handlers:  # everything is in the log file; a person sees ProgressHook
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _raise  # type: ignore[method-assign]  # of a full disk; logging would print it
            else:
                handler.setLevel(logging.ERROR)
        return logger

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        if isinstance(self._train_dataloader, dict):
            self._train_dataloader = seeding.seeded_dataloader(self._train_dataloader, self.seed)
        with building("train_cfg, train_dataloader"):
            randomness = self.cfg.get("randomness") or {}
            self._train_dataloader = self.build_dataloader(
                self._train_dataloader, self.seed, randomness.get("diff_rank_seed", False)
            )
            drop_a_last_one(self._train_dataloader, self.model)
            built = super().build_train_loop(loop)
        if len(built.dataloader) == 0:
            batch = self.cfg.train_dataloader.get("batch_size")
            raise UserError(f"train_dataloader.batch_size={batch}: larger than the training set, choose a smaller one")
        return built

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        if self.cfg.get("fsdp"):
            return model.to(get_device())  # divided when its first weights are in it
        wrapped = super().wrap_model(model_wrapper_cfg, model)
        return wrapped.to(self.cfg.device) if self.cfg.get("device") else wrapped

    def build_val_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        with building("val_cfg, val_dataloader, val_evaluator"):
            return super().build_val_loop(loop)

    def build_test_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        with building("test_cfg, test_dataloader, test_evaluator"):
            return super().build_test_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        if self.cfg.get("fsdp") and not self.sharded:
            self._init_model_weights()
            self._load_initial_weights()
            sharding.shard(self.model)
            self.sharded = True
        with building("optim_wrapper"):
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        with building("param_scheduler"):
            return super().build_param_scheduler(scheduler)

    def _init_model_weights(self) -> None:
        """mmengine's, which comes after the optimizer is built: too late where the model is divided among processes."""
        if not self.sharded:
            super()._init_model_weights()

    def _load_initial_weights(self) -> None:
        if self.initial_weights is not None:
            start_from(self.model, self.initial_weights)

    def load_or_resume(self) -> None:
        if not self.sharded:
            self._load_initial_weights()  # mmengine has initialised the model by now
        if self.resumed is not None:
            self.resumed.check_built(self.optim_wrapper, self.param_schedulers)
            if self.sharded:
                found = self.resumed.content["optimizer"]
                self.resumed.content["optimizer"] = sharding.divided_state(found, self.optim_wrapper.optimizer)
            self.resume(str(self.resumed.path))

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What was read and checked before the run began, instead of mmengine's own reading of the file."""
        assert self.resumed is not None
        checkpoint = dict(self.resumed.content)
        checkpoint["meta"] = {**checkpoint["meta"], "seed": self.resumed.seed}
        checkpoint["meta"]["dataset_meta"] = getattr(self.train_dataloader.dataset, "metainfo", None)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        inner: Any = self.model.module if is_model_wrapper(self.model) else self.model
        state = checkpoint["state_dict"]
        inner.load_state_dict(sharding.divided(state, inner.state_dict()) if self.sharded else state)
        return checkpoint

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with sharding.gathered(self.model, self.optim_wrapper.optimizer) if self.sharded else contextlib.nullcontext():
            super().save_checkpoint(*args, **kwargs)

    def dump_config(self) -> None:
        if self._train_loop is not None:  # a test leaves the training's config as it is
            super().dump_config()


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Every local file that mmengine, mmdet or mmseg read, such as an `init_cfg` names, is read as all others are."""
    return read_checkpoint(filename)


@CheckpointLoader.register_scheme(prefixes=("http://", "https://"), force=True)
def load_from_http(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A file from the network: downloaded into PyTorch's cache, and read as all others are."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(urlsplit(filename).path).name)[-200:] or "weights.pth"
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        fetch(filename, target, flaw=flaw)
    except DownloadError as error:
        raise UserError(str(error)) from error
    return read_checkpoint(target)


def prepare(config: Config, sections: Collection[str] = config_check.RUNNER) -> ModuleType:
    """Import what ``config``'s task needs, so that its registries know all names, and return the task's module.

    Args:
        config: of a run.
        sections: those that will be used, in which every key has to be one that somebody reads.

    Raises:
        UserError: the task's extra is not installed, or the config has a key that nobody reads.
    """
    if config.task not in TASKS:
        raise UserError(f"config task={config.task!r}: choose {', '.join(TASKS)}")
    if config.get("on_bad", "stop") not in ("stop", "skip"):
        raise UserError(f"config on_bad={config.on_bad!r}: choose stop or skip")
    module = task_module(config.task)
    config_check.check(config, sections)
    return module


def task_module(task: str) -> ModuleType:
    """The module of a task; importing it makes the task's registries know all names.

    Raises:
        UserError: the task's extra is not installed.
    """
    try:
        if task != "classification":
            importlib.import_module("hybridzoo.train.mmcv_ops").install()
        return importlib.import_module(f"hybridzoo.train.{task}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("hybridzoo"):
            raise
        extra = "train" if task == "classification" else task
        raise UserError(f"{task} needs {error.name}: pip install 'hybridzoo[{extra}]'") from error
    except ImportError as error:
        if "libGL" not in str(error):
            raise
        raise UserError(
            f"{task} needs OpenCV, whose build with windows misses {str(error).split(':')[0]}: "
            "pip install --force-reinstall --no-deps opencv-python-headless"
        ) from error


def train(
    config: Config,
    *,
    work_dir: str | Path | None = None,
    resume: bool = False,
    amp: bool | None = None,
    launcher: str = "none",
    weights: str | Path | None = None,
    data: str | Path | None = None,
    wandb: bool = True,
    tensorboard: bool = False,
    fsdp: bool = False,
    seed: int | None = None,
    device: str | None = None,
    pictures: bool = False,
) -> dict[str, float]:
    """Train, validate and save as ``config`` says.

    Args:
        config: from :func:`hybridzoo.train.config.load_config`; it is not changed.
        work_dir: where checkpoints, logs, the resolved config and at the end ``final.pth`` (weights and meta only) go.
            Default ``work_dirs/<config name>``.
        resume: go on from the checkpoint in ``work_dir`` that has come furthest; from the start where there is none.
            Without it, ``work_dir`` must not hold a run's checkpoints.
        amp: mixed precision in the config's ``amp_dtype``. Default: in everyday recipes where a GPU has bfloat16, in
            others not.
        launcher: ``"pytorch"`` under torchrun, ``"slurm"`` under srun, else ``"none"``.
        weights: file to start from, or the name of a published one (``dinat_mini.in1k``), which is downloaded: of a
            whole model, or of the backbone alone.  The class heads may differ.  A detector or segmentor of another
            kind, ours or published, gives its backbone.
        data: the user's own data instead of the config's, in the task's layout.
        wandb: log to Weights & Biases, offline where it cannot be reached.
        tensorboard: write TensorBoard's files too.
        fsdp: divide parameters, gradients and optimizer state among the processes, see `hybridzoo.train.sharding`.
        seed: default the config's, or with ``resume`` the interrupted run's.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; default a GPU where there is one.
        pictures: also draw the curves of the training and the results, see `hybridzoo.train.results.draw`.

    Returns:
        The metrics of the last validation; `results.json` in the work folder has them class by class.

    Raises:
        UserError: bad input, a loss that is not finite, a full disk, or a ``work_dir`` that another run is in.
        Terminated: the process got SIGTERM.
    """
    config = copy.deepcopy(config)
    chosen = overrides.values(config)
    if data is not None and "data_root" in chosen:
        raise UserError(
            f"option 'data_root={config.data_root}': would change nothing beside --data {data}; leave one out"
        )
    if seed is not None:
        config.randomness = {**config.get("randomness", {}), "seed": int(seed)}
    device = device or config.get("device")
    if device is not None:
        config.device = check_device(device)
    task = prepare(config)
    if data is not None and config.get("digits"):
        config.digits = None
    if weights is None:
        weights = config.get("load_from")
    resume = resume or bool(config.get("resume"))
    config.resume, config.load_from = False, None
    _check_intervals(config)
    place = run_folder.RunFolder(folder_of(config, work_dir), f"{_stem(config)}.py")
    with launching.process_group(launcher), place, interruptions.running(place.path):
        state = _beginning(place, resume)
        if state is not None:
            place.keep()
        whole = False
        everyday = bool(config.get("settle"))
        started = state is not None and state.started
        if state is None:
            weights = settle.starting_weights(config, weights)
            started = weights is not None
        else:
            weights = None
        if weights is not None:
            whole = _is_whole_model(weights)  # read before a folder is made, which a bad file would leave behind
        _hold_out(config, state, seed)
        task.configure(config, Path(data) if data is not None else None)
        if state is not None:
            state.check(config)
        if fsdp:
            config.fsdp = True
        if config.get("fsdp"):
            _check_fsdp(config, launcher)
        if everyday:
            settle.fit_data(config, settle.count_images(config), started=started)
        single_images(config)
        folder = _set_up(config, work_dir, launcher)
        launching.first_decides(place.claim)
        if amp or (amp is None and everyday and settle.use_amp_here(device)):
            optim.use_amp(config.optim_wrapper, config.get("amp_dtype", "bfloat16"))
        add_wandb(config, folder, on=wandb)
        add_tensorboard(config, on=tensorboard)

        if is_main_process():
            hooks.remove_leftovers(folder)
            if resume:
                print(f"resuming from {state.path}" if state else f"nothing to resume in {folder}: starting anew")
        run = (state.run if state else "") or run_folder.new_run()
        place.begin(run)
        if state is not None:
            config.resume = True  # hooks ask for it
            if seed is None:  # loaders are built before mmengine looks at the checkpoint's seed
                config.randomness = {**config.get("randomness", {}), "seed": state.seed}
        origin = f"resumed from {state.path}" if state is not None else str(weights or "")
        lineage = state.lineage if state is not None else tuple(provenance.start_of(weights, config))
        if state is None and weights is not None and _takes_a_backbone(config.model) and not whole:
            config.model.backbone.weights, weights = str(weights), None

        overrides.check_kept(config, chosen)
        config.pop("options", None)
        with building("(model, hooks, visualizer, randomness)"):
            runner = Runner.from_cfg(config)
        runner.initial_weights, runner.resumed = weights, state
        runner.run, runner.started, runner.origin, runner.lineage = run, started, origin, lineage
        try:
            runner.train()
            metrics = _validation_metrics(runner)
            if not metrics and runner.val_loop is not None:  # resumed after the last epoch
                runner.val_loop.run()
                metrics = _validation_metrics(runner)
            _save_final(runner)
            if is_main_process():
                weights = folder / "final.pth"
                testing.leave(config, runner.val_loop, folder, metrics, pictures=pictures, checkpoint=str(weights))
                print(f"weights: {weights}")
        finally:
            if runner.iter:
                place.keep()
            else:
                runner.visualizer.close()  # whose files go
            _close(runner)
    return metrics


def test(
    config: Config | None,
    checkpoint: str | Path,
    *,
    work_dir: str | Path | None = None,  # noqa: PT028
    launcher: str = "none",  # noqa: PT028
    data: str | Path | None = None,  # noqa: PT028
    device: str | None = None,  # noqa: PT028
    tta: bool = False,  # noqa: PT028
    slide: views.Slide | None = None,  # noqa: PT028
    pictures: bool = False,  # noqa: PT028
    split: str = "val",  # noqa: PT028
) -> dict[str, float]:
    """Measure a checkpoint on the test set, or on the validation set where the config has no test set.

    Class by class, with what was taken for what, the results are in `results.json` (see `hybridzoo.train.results`) in
    the work folder.

    Args:
        config: as it was trained; None takes what the checkpoint holds.
        checkpoint: its weights, which have to fit completely, or the folder of the run that left them.
        work_dir: for the results and the log. Default: the run's folder that the checkpoint lies in, where no config is
            given, else ``work_dirs/<config name>``.
        launcher: as in :func:`train`.
        data: as in :func:`train`. Classes are matched by name, whatever their order.
        device: as in :func:`train`.
        tta: average over flipped and, for detection and segmentation, resized images.
        slide: segmentation: predict windows of this size and step, and merge them.
        pictures: also draw the results, see `hybridzoo.train.results.draw`.
        split: "val", or "test" of data that have one; a config's own test set counts as "val" where it has one.

    Returns:
        Metric -> value.

    Raises:
        UserError: bad input, a config that contradicts the checkpoint, or a checkpoint of another model.
    """
    path = trained.find(checkpoint)
    if config is None:
        config, own_folder = trained.load(path), trained.folder_of(path)
    else:
        config, own_folder = copy.deepcopy(config), None
        prepare(config)
        trained.compare(config, path)
    names = class_names(path)
    with launching.process_group(launcher):
        place = Path(data) if data is not None else None
        task_module(config.task).configure(config, place, splits=(split,), classes=names or None)
        folder = _set_up(config, work_dir or own_folder, launcher)
        if device is not None:
            config.device = check_device(device)
        add_wandb(config, folder, on=False)  # a run's config still has its training's
        testing.arrange(config)
        _drop_missing_hooks(config)
        resuming.compare_classes(path, names, resuming.class_names(config))
        views.apply(config, tta=tta, slide=slide)
        with interruptions.running(folder):
            with building("(model, hooks, visualizer, randomness)"):
                runner = Runner.from_cfg(config)
            network = views.inner(runner.model)
            load_weights(network, path, allow_head_mismatch=False)
            testing.fuse(network, len(runner.test_dataloader.dataset))
            try:
                found = runner.test()
            finally:
                _close(runner)
            metrics = {name: float(value) for name, value in found.items() if isinstance(value, Real)}
            if is_main_process():
                facts = {
                    "split": split,
                    "checkpoint": str(path.resolve()),
                    "options": {"tta": tta, "slide": slide and list(slide)},
                }
                testing.leave(config, runner.test_loop, folder, metrics, pictures=pictures, **facts)
            return metrics


def build_for_inference(
    config: Config | None, checkpoint: str | Path, device: str | torch.device | None = None
) -> nn.Module:
    """The trained model in evaluation mode, without any data.

    Args:
        config: as it was trained; None takes what the checkpoint holds.
        checkpoint: its weights, which have to fit completely, or the folder of the run that left them.
        device: default a GPU where there is one.

    Returns:
        The model; ``model.dataset_meta["classes"]`` has the class names in the checkpoint, else the classes' numbers.

    Raises:
        UserError: unreadable checkpoint, one of another model, or a config that contradicts it.
    """
    path = trained.find(checkpoint)
    if config is None:
        config = trained.load(path)
    else:
        config = copy.deepcopy(config)
        prepare(config, ("model",))
        trained.compare(config, path)
    names = class_names(path)
    if names:
        _set_num_classes(config.model, len(names))
    else:  # weights that somebody else trained
        names = tuple(str(index) for index in range(_num_classes(config.model)))
    config.model.pop("pretrained", None)
    scope = config.get("default_scope", "mmengine")
    with interruptions.quiet(), building("model"), DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config.model)
    load_weights(model, path, allow_head_mismatch=False)
    model.dataset_meta = {"classes": names}
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def class_names(checkpoint: str | Path) -> tuple[str, ...]:
    """The classes that a checkpoint of ours was trained on; empty for weights that somebody else trained."""
    return resuming.names_in(checkpoint, trained.meta_of(Path(checkpoint)))


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that ``--resume`` goes on from: of the folder's own run the one with most progress.

    Raises:
        UserError: there are checkpoints, but none can be read, or they are of several runs.
    """
    return next(run_folder.newest_first(Path(folder)), None)


def load_weights(model: nn.Module, path: str | Path, *, allow_head_mismatch: bool) -> None:
    """Load a file into a model of any task; all of it has to fit, see :func:`hybridzoo.train.weights.load_matching`."""
    inner: Any = model.module if is_model_wrapper(model) else model
    if hasattr(inner, "load_weights"):
        inner.load_weights(path, allow_head_mismatch=allow_head_mismatch)
    else:
        state = read_state_dict(path, strip=False)
        report = load_matching(inner, state, allow_head_mismatch=allow_head_mismatch, source=path)
        if allow_head_mismatch:
            tell(f"weights {path}: {report}")


def start_from(model: nn.Module, path: Path) -> None:
    """Load a file's weights before training: all of them but other class heads, or else those of the backbone.

    Raises:
        UserError: not even the backbone fits; the model is untouched.
    """
    inner: Any = model.module if is_model_wrapper(model) else model
    try:
        load_weights(inner, path, allow_head_mismatch=True)
    except UserError as error:
        if not hasattr(getattr(inner, "backbone", None), "load"):
            raise
        tell(f"{error}: taking its backbone alone")  # another detector's neck and heads, or a segmentor's
        inner.backbone.load(path)


def _stem(config: Config) -> str:
    return Path(config.filename).stem if config.filename else "run"


def folder_of(config: Config, work_dir: str | Path | None) -> Path:
    """Where a run works: the folder asked for, the config's, or `work_dirs/<config name>`."""
    return Path(work_dir or config.get("work_dir") or Path("work_dirs", _stem(config)))


def _check_intervals(config: Config) -> None:
    checkpoint: Any = config.default_hooks.get("checkpoint") or {}
    steps = (config.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    if not checkpoint.get("by_epoch", True) and checkpoint.get("interval", steps) % steps:
        raise UserError(  # a checkpoint holds no gradients
            f"default_hooks.checkpoint.interval={checkpoint.interval}: choose a multiple of accumulative_counts={steps}"
        )


def _check_fsdp(config: Config, launcher: str) -> None:
    if launcher == "none":
        raise UserError("--fsdp: there is one process, nothing to divide; use torchrun and --launcher pytorch")
    if any("EMA" in str(hook.get("type")) for hook in config.get("custom_hooks") or ()):
        raise UserError("--fsdp: no moving average of divided weights is kept; give --cfg-options custom_hooks=[]")


def _hold_out(config: Config, state: resuming.State | None, seed: int | None) -> None:
    """Settle, in place, how the training images are divided: on a resumed run as they were.

    Raises:
        UserError: no share, or another than the run's.
    """
    given = config.get("val_fraction")
    if isinstance(given, int | float):
        first = seed if seed is not None else (config.get("randomness") or {}).get("seed") or 0
        given = Holdout(float(given), int(first)).options()
    asked = holdout_of(given)
    if state is not None:
        before = state.holdout
        if asked is not None and (before is None or before.fraction != asked.fraction):
            was = f"began with --val-fraction {before.fraction:g}" if before else "began without --val-fraction"
            raise UserError(f"--val-fraction {asked.fraction:g}: the run {was}, and goes on with that")
        asked = before
    config.pop("val_fraction", None)
    if asked is not None:
        config.val_fraction = asked.options()


def _beginning(place: run_folder.RunFolder, resume: bool) -> resuming.State | None:
    """What the run goes on from, if anything; a fresh run wants a folder without another run's files."""
    state: resuming.State | None = None

    def decide() -> Path | None:
        nonlocal state
        if place.path.is_dir():
            place.claim()
        if resume:
            state = resuming.find(place.path)
        else:
            run_folder.refuse_old_files(place.path)
        return state.path if state is not None else None

    path = launching.first_decides(decide)
    return resuming.read(path) if path is not None and state is None else state


def _raise(record: logging.LogRecord) -> None:
    raise


def _set_up(config: Config, work_dir: str | Path | None, launcher: str) -> Path:
    """Fill in what depends on this machine and this call; return the work folder."""
    folder, stem = folder_of(config, work_dir), _stem(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"work_dir {folder}: cannot be made ({error.strerror})") from error
    config.work_dir = str(folder)
    # mmengine keeps one object per name and names runs by the second: two in one process would share their state.
    config.experiment_name = f"{stem}_{next(_runs)}"
    if config.get("visualizer"):
        config.visualizer.name = config.experiment_name
    config.launcher = "none" if launcher == "none" else "pytorch"  # the processes have found each other
    if launcher != "none" and not torch.cuda.is_available():
        wrapper = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "device_ids": None}
        wrapper["find_unused_parameters"] = config.get("find_unused_parameters", False)
        config.model_wrapper_cfg = {**wrapper, **(config.get("model_wrapper_cfg") or {})}
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loader = config.get(key)
        if loader and not loader.get("num_workers"):  # torch refuses both without workers
            loader.persistent_workers = False
            loader.pop("prefetch_factor", None)
    return folder


def _takes_a_backbone(model: Any) -> bool:
    return model.get("backbone", {}).get("type") == "PyramidBackbone"


def _is_whole_model(weights: str | Path) -> bool:
    """Whether a file holds a detector or segmentor of ours; a published one has other names, its backbone fits."""
    return any(name.startswith("backbone.model.") for name in read_state_dict(weights, strip=False))


def _validation_metrics(runner: Runner) -> dict[str, float]:
    scalars = runner.message_hub.log_scalars
    names = [name for name in scalars if name.startswith("val/") and name not in ("val/time", "val/data_time")]
    return {name.removeprefix("val/"): float(scalars[name].current()) for name in names}


def _save_final(runner: Runner) -> None:
    meta = {"epoch": runner.epoch, "iter": runner.iter}
    runner.save_checkpoint(
        runner.work_dir,
        "final.pth",
        save_optimizer=False,
        save_param_scheduler=False,
        meta=meta,
        backend_args={"backend": "atomic"},
    )


def _close(runner: Runner) -> None:
    for hook in runner.hooks:
        if isinstance(hook, progress.ProgressHook):
            hook.close()


def _drop_missing_hooks(config: Config) -> None:
    """mmengine accepts None for its own default hooks only."""
    own = {"runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint"}
    config.default_hooks = {key: hook for key, hook in config.default_hooks.items() if hook is not None or key in own}


def _set_num_classes(node: Any, num_classes: int) -> None:
    """Set every ``num_classes`` in the config of a model: of the classifier, or of the box, mask and decode heads."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "num_classes":
                node[key] = num_classes
            else:
                _set_num_classes(value, num_classes)
    elif isinstance(node, list | tuple):
        for item in node:
            _set_num_classes(item, num_classes)


def _num_classes(node: Any) -> int:
    """The first ``num_classes`` in the config of a model, 0 without one."""
    if isinstance(node, dict):
        return int(node.get("num_classes") or next(filter(None, map(_num_classes, node.values())), 0))
    return next(filter(None, map(_num_classes, node)), 0) if isinstance(node, list | tuple) else 0
