"""DINO with four scales and 900 queries around a timm backbone: mmdet's detector with the settings that mmdet gives it.

6 + 6 layers of width 256, 8 heads, no dropout; 100 denoising queries with label noise 0.5 and box noise 1.0; costs and
losses 2 (class; loss 1), 5 (L1) and 2 (GIoU).
"""

_width, _levels = 256, 4
_ffn = dict(embed_dims=_width, feedforward_channels=2048, ffn_drop=0.0)
_deformable = dict(embed_dims=_width, num_levels=_levels, dropout=0.0)

model = dict(
    type="DINO",
    num_queries=900,
    with_box_refine=True,
    as_two_stage=True,
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=1,
    ),
    backbone=dict(
        type="PyramidBackbone",
        name="dinat_mini",
        strides=(8, 16, 32),
        out_norm="LN",
        norm_eval=True,
        drop_path_rate=0.1,
    ),
    neck=dict(
        type="ChannelMapper",
        in_channels=[128, 256, 512],
        kernel_size=1,
        out_channels=_width,
        act_cfg=None,
        norm_cfg=dict(type="GN", num_groups=32),
        num_outs=_levels,
    ),
    encoder=dict(num_layers=6, layer_cfg=dict(self_attn_cfg=_deformable, ffn_cfg=_ffn)),
    decoder=dict(
        num_layers=6,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=_width, num_heads=8, dropout=0.0),
            cross_attn_cfg=_deformable,
            ffn_cfg=_ffn,
        ),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=_width // 2, normalize=True, offset=0.0, temperature=20),
    bbox_head=dict(
        type="DINOHead",
        num_classes=80,
        sync_cls_avg_factor=True,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
    ),
    dn_cfg=dict(
        label_noise_scale=0.5,
        box_noise_scale=1.0,
        group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=100),
    ),
    train_cfg=dict(
        assigner=dict(
            type="HungarianAssigner",
            match_costs=[
                dict(type="FocalLossCost", weight=2.0),
                dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
                dict(type="IoUCost", iou_mode="giou", weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=300),
)
