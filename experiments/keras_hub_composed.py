"""Backbones of keras-hub that are put together of parts, small."""

from __future__ import annotations

from typing import Any

from experiments.keras_hub_small import HGNET, IMAGE, LENGTH, SIDE, VITDET, models, named, small


def blip2() -> Any:
    from keras_hub.src.models.blip2.blip2_custom_opt import BLIP2CustomOPT
    from keras_hub.src.models.blip2.blip2_qformer import BLIP2QFormer
    from keras_hub.src.models.blip2.blip2_vision_encoder import BLIP2VisionEncoder

    common = {"dropout": 0.0, "num_query_tokens": 4, "layer_norm_epsilon": 1e-5}
    encoder = small(
        BLIP2VisionEncoder,
        image_size=SIDE,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
    )
    former = small(BLIP2QFormer, vision_dim=16, cross_attention_frequency=2, **common)
    text = small(BLIP2CustomOPT, qformer_hidden_dim=16, **common)
    return models().BLIP2Backbone(encoder, former, text)


def mobile_net_v5() -> Any:
    from keras_hub.src.models.mobilenetv5.mobilenetv5_builder import convert_arch_def_to_stackwise

    stages = [["er_r1_k3_s2_e2_c8"], ["uir_r1_a3_k3_s2_e2_c16"], ["mqa_r1_k3_h2_s1_d8_c16"]]
    return models().MobileNetV5Backbone(
        **convert_arch_def_to_stackwise(stages), num_features=16, msfa_output_resolution=8, **IMAGE
    )


def sam() -> Any:
    import keras_hub

    prompts = small(
        keras_hub.layers.SAMPromptEncoder,
        image_embedding_size=(4, 4),
        input_image_size=(SIDE, SIDE),
        mask_in_channels=16,
        hidden_size=8,
    )
    masks = small(
        keras_hub.layers.SAMMaskDecoder,
        hidden_size=8,
        embedding_dim=8,
        num_multimask_outputs=3,
        iou_head_depth=2,
        iou_head_hidden_dim=8,
    )
    return models().SAMBackbone(VITDET(), prompts, masks)


def sam3() -> Any:
    import keras_hub

    layers, image = keras_hub.layers, {"image_shape": (56, 56, 3), "patch_size": 14}
    return models().SAM3PromptableConceptBackbone(
        small(
            layers.SAM3VisionEncoder,
            num_layers=2,
            fpn_hidden_dim=16,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=(28, 28, 3),
            window_size=2,
            global_attn_indexes=[1],
            **image,
        ),
        small(layers.SAM3TextEncoder),
        small(layers.SAM3GeometryEncoder, roi_size=3),
        small(layers.SAM3DetrEncoder),
        small(layers.SAM3DetrDecoder, num_queries=5, **image),
        small(layers.SAM3MaskDecoder, num_upsampling_stages=2),
    )


def stable_diffusion() -> Any:
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone

    hub = models()
    coder = {"num_filters": [32, 32, 32, 32], "num_blocks": [1, 1, 1, 1]}
    vae = VAEBackbone(**{f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in coder.items()})
    texts = [
        small(hub.CLIPTextEncoder, max_sequence_length=LENGTH, intermediate_output_index=0, name=f"clip_{side}")
        for side in "lg"
    ]
    return hub.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=16,
        mmdit_num_layers=1,
        mmdit_num_heads=2,
        mmdit_position_size=8,
        mmdit_qk_norm=None,
        mmdit_dual_attention_indices=None,
        vae=vae,
        clip_l=texts[0],
        clip_g=texts[1],
        image_shape=(SIDE, SIDE, 3),
    )


def mobile_net() -> Any:
    stages = {"expansion": 16, "num_filters": 8, "kernel_size": 3, "se_ratio": 0.25, "activation": "hard_swish"}
    return small(
        models().MobileNetBackbone,
        **{f"stackwise_{k}": [[v, v]] for k, v in stages.items()},
        stackwise_num_blocks=[2],
        stackwise_num_strides=[[2, 1]],
        stackwise_padding=[[1, 1]],
        output_num_filters=16,
        depthwise_filters=8,
        depthwise_stride=2,
        depthwise_residual=False,
        last_layer_filter=16,
        squeeze_and_excite=0.5,
    )


def d_fine() -> Any:
    encoder = named("HGNetV2Backbone", **HGNET, out_features=["stage3", "stage4"])()
    return small(
        models().DFineBackbone,
        backbone=encoder,
        decoder_in_channels=[16, 16],
        encoder_hidden_dim=16,
        num_labels=4,
        num_denoising=0,
        learn_initial_query=False,
        num_queries=10,
        anchor_image_size=(64, 64),
        feat_strides=[16, 32],
        num_feature_levels=2,
        encoder_in_channels=[16, 16],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=16,
        num_encoder_layers=1,
        hidden_expansion=0.5,
        depth_multiplier=0.5,
        eval_idx=-1,
        num_decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=16,
        num_lqe_layers=2,
        image_shape=(64, 64, 3),
    )
