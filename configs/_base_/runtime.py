"""What every run of every task shares: safe checkpoints, seeds, logs."""

default_scope = "mmengine"

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=10),
    param_scheduler=dict(type="ParamSchedulerHook"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    sync_buffers=dict(type="SyncBuffersHook"),
    checkpoint=dict(type="AtomicCheckpointHook", interval=1, max_keep_ckpts=2),
    seed=dict(type="SeedHook"),
    batch_norm=dict(type="BatchNormWarmUpHook"),
    stop_on_nan=dict(type="StopOnNaNHook"),
    progress=dict(type="ProgressHook"),
)

env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0))
log_processor = dict(by_epoch=True, window_size=50)
log_level = "INFO"
randomness = dict(seed=0)
amp_dtype = "bfloat16"
