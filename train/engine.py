"""One engine for the three tasks: starts, resumes, tests and stops mmengine's runner in the same way for all."""

from __future__ import annotations

import copy
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from mmengine import Config
from mmengine.dist import is_main_process
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import hybridzoo.train.early_stop  # noqa: F401 - a hook that configs name
from hybridzoo.train import (
    hooks,
    interruptions,
    launching,
    optim,
    overrides,
    provenance,
    resuming,
    run_folder,
    settle,
    testing,
    trained,
    views,
)
from hybridzoo.train.batchnorm import single_images
from hybridzoo.train.devices import check_device
from hybridzoo.train.errors import UserError, building
from hybridzoo.train.preparing import (
    check_fsdp,
    check_intervals,
    count_classes,
    drop_missing_hooks,
    folder_of,
    hold_out,
    prepare,
    run_name,
    set_num_classes,
    set_up,
    task_module,
)
from hybridzoo.train.runner import Runner, close_progress, save_final, validation_metrics
from hybridzoo.train.tracking import add_tensorboard, add_wandb
from hybridzoo.train.weights import is_whole_model, load_weights


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
    """Train, validate and save with the settings in ``config``.

    Args:
        config: from :func:`hybridzoo.train.config.load_config`; not changed.
        work_dir: folder for checkpoints, logs, the resolved config and at the end ``final.pth`` (weights and meta
            only). Default ``work_dirs/<config name>``.
        resume: continue from the checkpoint in ``work_dir`` with the most progress, or start if there is none. Without
            it, ``work_dir`` must not contain a run's checkpoints.
        amp: mixed precision in the config's ``amp_dtype``. Default: on in everyday recipes if the GPU has bfloat16,
            otherwise off.
        launcher: ``"pytorch"`` under torchrun, ``"slurm"`` under srun, else ``"none"``.
        weights: file to start from, or the name of a published one (``dinat_mini.in1k``), which is downloaded. It may
            hold a whole model or a backbone. The class heads may differ. From another type of detector or segmentor,
            ours or published, the backbone is used.
        data: the user's own data instead of the config's, in the task's layout.
        wandb: log to Weights & Biases, offline if it cannot be reached.
        tensorboard: also write TensorBoard's files.
        fsdp: divide parameters, gradients and optimizer state among the processes, see `hybridzoo.train.sharding`.
        seed: default the config's, or with ``resume`` the interrupted run's.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; default a GPU if there is one.
        pictures: also draw the curves of the training and the results, see `hybridzoo.train.results.draw`.

    Returns:
        The metrics of the last validation; `results.json` in the work folder has the values of each class.

    Raises:
        UserError: bad input, a loss that is not finite, a full disk, or a ``work_dir`` in which another run is
            training.
        Terminated: the process got SIGTERM.
    """
    config = copy.deepcopy(config)
    chosen = overrides.values(config)
    if data is not None and "data_root" in chosen:
        raise UserError(
            f"option 'data_root={config.data_root}': would change nothing with --data {data}; leave one out"
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
    check_intervals(config)
    place = run_folder.RunFolder(folder_of(config, work_dir), f"{run_name(config)}.py")
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
            whole = is_whole_model(weights)  # read before the folder is made, so that a bad file leaves no folder
        hold_out(config, state, seed)
        task.configure(config, Path(data) if data is not None else None)
        if state is not None:
            state.check(config)
        if fsdp:
            config.fsdp = True
        if config.get("fsdp"):
            check_fsdp(config, launcher)
        if everyday:
            settle.fit_data(config, settle.count_images(config), started=started)
        single_images(config)
        folder = set_up(config, work_dir, launcher)
        launching.first_decides(place.claim)
        if amp or (amp is None and everyday and settle.use_amp_here(device)):
            optim.use_amp(config.optim_wrapper, config.get("amp_dtype", "bfloat16"))
        add_wandb(config, folder, on=wandb)
        add_tensorboard(config, on=tensorboard)

        if is_main_process():
            hooks.remove_leftovers(folder)
            if resume:
                print(f"resuming from {state.path}" if state else f"nothing to resume in {folder}: starting a new run")
        run = (state.run if state else "") or run_folder.new_run()
        place.begin(run)
        if state is not None:
            config.resume = True  # hooks ask for it
            if seed is None:  # loaders are built before mmengine reads the checkpoint's seed
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
            metrics = validation_metrics(runner)
            if not metrics and runner.val_loop is not None:  # resumed after the last epoch
                runner.val_loop.run()
                metrics = validation_metrics(runner)
            save_final(runner)
            if is_main_process():
                weights = folder / "final.pth"
                testing.leave(config, runner.val_loop, folder, metrics, pictures=pictures, checkpoint=str(weights))
                print(f"weights: {weights}")
        finally:
            if runner.iter:
                place.keep()
            else:
                runner.visualizer.close()  # the files of which are removed
            close_progress(runner)
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
    """Measure a checkpoint on the test set, or on the validation set if the config has no test set.

    The scores of each class and the confusion matrix are in `results.json` (see `hybridzoo.train.results`) in the work
    folder.

    Args:
        config: the config of the training; None uses the checkpoint's.
        checkpoint: its weights, which must fit completely, or the folder of the run that wrote them.
        work_dir: folder for the results and the log. Default: without a config, the run's folder with the checkpoint;
            otherwise ``work_dirs/<config name>``.
        launcher: as in :func:`train`.
        data: as in :func:`train`. Classes are matched by name, in any order.
        device: as in :func:`train`.
        tta: average over flipped and, for detection and segmentation, resized images.
        slide: segmentation: predict windows of this size and step, and merge them.
        pictures: also draw the results, see `hybridzoo.train.results.draw`.
        split: "val", or "test" for data that has one; a config's own test set counts as "val".

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
        folder = set_up(config, work_dir or own_folder, launcher)
        if device is not None:
            config.device = check_device(device)
        add_wandb(config, folder, on=False)  # a run's config still contains that of the training
        testing.arrange(config)
        drop_missing_hooks(config)
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
                close_progress(runner)
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
    """The trained model in evaluation mode, without data.

    Args:
        config: the config of the training; None uses the checkpoint's.
        checkpoint: its weights, which must fit completely, or the folder of the run that wrote them.
        device: default a GPU if there is one.

    Returns:
        The model; ``model.dataset_meta["classes"]`` has the class names in the checkpoint, or the class indices.

    Raises:
        UserError: an unreadable checkpoint, another model's checkpoint, or a config that contradicts it.
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
        set_num_classes(config.model, len(names))
    else:  # weights that were not trained here
        names = tuple(str(index) for index in range(count_classes(config.model)))
    config.model.pop("pretrained", None)
    scope = config.get("default_scope", "mmengine")
    with interruptions.quiet(), building("model"), DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config.model)
    load_weights(model, path, allow_head_mismatch=False)
    model.dataset_meta = {"classes": names}
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def class_names(checkpoint: str | Path) -> tuple[str, ...]:
    """The classes that our checkpoint was trained on; empty for other weights."""
    return resuming.names_in(checkpoint, trained.meta_of(Path(checkpoint)))


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint from which ``--resume`` continues: the one of the folder's run with the most progress.

    Raises:
        UserError: there are checkpoints, but none can be read, or they belong to several runs.
    """
    return next(run_folder.newest_first(Path(folder)), None)


def _beginning(place: run_folder.RunFolder, resume: bool) -> resuming.State | None:
    """The state from which the run continues, if any; a new run needs a folder without another run's files."""
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


def _takes_a_backbone(model: Any) -> bool:
    return model.get("backbone", {}).get("type") == "PyramidBackbone"
