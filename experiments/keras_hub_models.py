"""Small models of keras-hub with random weights: every backbone that can be built, and a task model of each kind.

They have the structure of the published ones, a few layers of a few channels, and inputs of open sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

VOCABULARY, LENGTH, SIDE = 40, 12, 32

# By name of the parameter, for whatever has it
SMALL: dict[str, Any] = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 1,
    "num_heads": 2,
    "num_query_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "head_size": 8,
    "hidden_dim": 16,
    "hidden_size": 16,
    "embedding_dim": 16,
    "intermediate_dim": 32,
    "mlp_dim": 32,
    "max_sequence_length": 16,
    "patch_size": 8,
    "moe_intermediate_dim": 16,
    "shared_expert_intermediate_dim": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 2,
    "top_k": 1,
    "expert_intermediate_dim": 16,
    "projection_dim": 8,
}

# By name of the input, its open sizes, where they are neither a length nor the side of an image
OPEN: dict[str, tuple[int, ...]] = {
    "points": (2,),
    "labels": (2,),
    "boxes": (1,),
    "box_labels": (1,),
    "masks": (1, 8, 8),
    "encoder_input_values": (2048,),
}


def small(build: Any, **own: Any) -> Any:
    """An object of keras-hub with small sizes.

    Args:
        build: its class.
        own: arguments besides `SMALL`.
    """
    known = {k: v for k, v in SMALL.items() if k in inspect.signature(build.__init__).parameters}
    return build(**{**known, **own})


def samples(model: keras.Model, count: int, seed: int = 0) -> Any:
    """Random inputs of a model, by name, or the only one: ids with padding at the end, images of 0 to 1.

    Args:
        model: of keras-hub.
        count: samples.
        seed: of the numbers.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, count)
    found: dict[str, np.ndarray] = {}
    for tensor in model.inputs:
        name, integers = tensor.name, "int" in str(tensor.dtype)
        if name in OPEN:
            tensor = keras.KerasTensor((None, *OPEN[name], *tensor.shape[len(OPEN[name]) + 1 :]), tensor.dtype)
        if "mask" in name and len(tensor.shape) == 2:
            found[name] = (np.arange(LENGTH) < lengths[:, None]).astype(str(tensor.dtype))
        elif integers or "bool" in str(tensor.dtype):
            limit = VOCABULARY if "token" in name else LENGTH if "position" in name else 2
            found[name] = rng.integers(0, limit, (count, *_sizes(tensor.shape, LENGTH))).astype("int32")
        else:
            found[name] = rng.random((count, *_sizes(tensor.shape, SIDE)), "float32")
    return found if len(found) > 1 else next(iter(found.values()))


def _sizes(shape: Any, size: int) -> tuple[int, ...]:
    return tuple(size if d is None else d for d in shape[1:])


def _models() -> Any:
    """`keras_hub.models`, which is imported when it is used."""
    import keras_hub

    return keras_hub.models


def _named(name: str, **own: Any) -> Callable[[], Any]:
    """What builds the small model of a class of keras-hub."""
    return lambda: small(getattr(_models(), name), **{k: v() if callable(v) else v for k, v in own.items()})


_IMAGE = {"image_shape": (SIDE, SIDE, 3)}
_TEXTS = (
    "Albert Bart Bert Bloom DebertaV3 DistilBert ESM FNet Falcon GPT2 GPTNeoX Gemma GptOss Llama Llama3 Mistral "
    "Mixtral OPT Phi3 Qwen Qwen3 Qwen3Moe Qwen3_5 Qwen3_5Moe QwenMoe RWKV7 Roberta RoformerV2 T5 Whisper XLMRoberta "
    "XLNet"
).split()
_RESNET = _named(
    "ResNetBackbone",
    input_conv_filters=[64],
    input_conv_kernel_sizes=[7],
    stackwise_num_filters=[64, 64, 64, 64],
    stackwise_num_blocks=[1, 1, 1, 1],
    stackwise_num_strides=[1, 2, 2, 2],
    block_type="basic_block",
)
_MIT = _named(
    "MiTBackbone",
    hidden_dims=[8, 16],
    layerwise_depths=[1, 1],
    layerwise_num_heads=[1, 2],
    layerwise_sr_ratios=[2, 1],
    layerwise_patch_sizes=[7, 3],
    layerwise_strides=[4, 2],
    max_drop_path_rate=0.1,
    **_IMAGE,
)
_HGNET = {
    "stem_channels": [3, 8, 8],
    "stackwise_stage_filters": [[8, 8, 16, 1, 3, 3], [16, 8, 16, 1, 3, 3], [16, 8, 16, 1, 3, 5], [16, 8, 16, 1, 3, 5]],
    "apply_downsample": [False, True, True, True],
    "use_lightweight_conv_block": [False, False, True, True],
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 16, 16],
    "embedding_size": 8,
    "use_learnable_affine_block": True,
    "hidden_act": "relu",
}
_ENCODERS = {**_IMAGE, "patch_size": 16}
_T5_GEMMA = {
    f"{side}_{k}": v
    for side in ("encoder", "decoder")
    for k, v in {
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "num_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "layer_types": ["full_attention"],
    }.items()
}
_SMOL = {
    "num_layers": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True, False],
    "layer_types": ["attention"] * 2,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 16,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}
_DINO = _named(
    "DINOV2Backbone", num_layers=4, patch_size=8, position_embedding_shape=(64, 64, 3), image_shape=(64, 64, 3)
)
_VITDET = _named(
    "ViTDetBackbone", num_layers=2, global_attention_layer_indices=[1], window_size=2, num_output_channels=8, **_IMAGE
)

_BACKBONES: dict[str, Callable[[], Any]] = {
    **{f"{name}Backbone": _named(f"{name}Backbone") for name in _TEXTS},
    "BASNetBackbone": _named(
        "BASNetBackbone", image_encoder=_RESNET, num_classes=1, projection_filters=8, image_shape=(64, 64, 3)
    ),
    "CLIPBackbone": _named(
        "CLIPBackbone",
        vision_encoder=_named("CLIPVisionEncoder", **_ENCODERS),
        text_encoder=_named("CLIPTextEncoder", max_sequence_length=LENGTH),
    ),
    "CSPNetBackbone": _named(
        "CSPNetBackbone",
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=1,
        stackwise_depth=[1, 2],
        stackwise_strides=[1, 2],
        stackwise_num_filters=[8, 16],
        block_type="dark_block",
        stage_type="dark",
    ),
    "DFineBackbone": lambda: _d_fine(),
    "DINOV2Backbone": _DINO,
    "DINOV3Backbone": _named("DINOV3Backbone", **_IMAGE),
    "DeepLabV3Backbone": _named(
        "DeepLabV3Backbone",
        image_encoder=_RESNET,
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P5",
        upsampling_size=8,
        dilation_rates=[1, 2],
        projection_filters=8,
        image_shape=(64, 64, 3),
    ),
    "DeiTBackbone": _named("DeiTBackbone", **_IMAGE),
    "DenseNetBackbone": _named("DenseNetBackbone", stackwise_num_repeats=[1, 2], growth_rate=8),
    "DepthAnythingBackbone": _named(
        "DepthAnythingBackbone",
        image_encoder=_DINO,
        reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_dims=[8, 8, 8, 8],
        fusion_hidden_dim=8,
        head_hidden_dim=8,
        head_in_index=-1,
        feature_keys=["stage1", "stage2", "stage3", "stage4"],
    ),
    "EdRecBackbone": _named("EdRecBackbone", vocab_size=VOCABULARY, num_layers_enc=1, num_layers_dec=1),
    "EfficientNetBackbone": _named(
        "EfficientNetBackbone",
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 1],
        stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 16],
        stackwise_expansion_ratios=[1, 4],
        stackwise_squeeze_and_excite_ratios=[0.0, 0.25],
        stackwise_strides=[1, 2],
        stackwise_block_types=["fused", "unfused"],
        stackwise_width_coefficients=[1.0, 1.0],
        stackwise_depth_coefficients=[1.0, 1.0],
        stackwise_force_input_filters=[0, 0],
        stackwise_nores_option=[False, False],
        num_features=16,
    ),
    "ElectraBackbone": _named("ElectraBackbone", vocab_size=VOCABULARY),
    "Gemma3Backbone": _named("Gemma3Backbone", image_size=SIDE),
    "Gemma4Backbone": _named("Gemma4Backbone", image_size=SIDE),
    "HGNetV2Backbone": _named("HGNetV2Backbone", **_HGNET, **_IMAGE),
    "MetaCLIP2Backbone": _named(
        "MetaCLIP2Backbone",
        vision_encoder=_named("MetaCLIP2VisionEncoder", **_ENCODERS),
        text_encoder=_named("MetaCLIP2TextEncoder", max_sequence_length=LENGTH),
    ),
    "MiTBackbone": _MIT,
    "MobileNetBackbone": lambda: _mobile_net(),
    "MoonshineBackbone": _named(
        "MoonshineBackbone",
        filter_dim=16,
        encoder_num_layers=1,
        decoder_num_layers=1,
        encoder_num_heads=2,
        decoder_num_heads=2,
    ),
    "PaliGemmaBackbone": _named(
        "PaliGemmaBackbone",
        image_size=SIDE,
        vit_patch_size=16,
        vit_num_heads=2,
        vit_hidden_dim=16,
        vit_intermediate_dim=32,
        vit_num_layers=1,
    ),
    "ResNetBackbone": _RESNET,
    "RetinaNetBackbone": _named(
        "RetinaNetBackbone", image_encoder=_RESNET, min_level=3, max_level=5, use_p5=False, image_shape=(64, 64, 3)
    ),
    "SegFormerBackbone": _named("SegFormerBackbone", image_encoder=_MIT, projection_filters=8),
    "SigLIPBackbone": _named(
        "SigLIPBackbone",
        vision_encoder=_named("SigLIPVisionEncoder", **_ENCODERS),
        text_encoder=_named("SigLIPTextEncoder", max_sequence_length=LENGTH, projection_dim=16),
        projection_dim=16,
    ),
    "SmolLM3Backbone": _named("SmolLM3Backbone", **_SMOL),
    "SwinTransformerBackbone": _named(
        "SwinTransformerBackbone",
        embed_dim=8,
        depths=(2, 2),
        num_heads=(1, 2),
        window_size=4,
        patch_size=4,
        **_IMAGE,
    ),
    "T5GemmaBackbone": _named("T5GemmaBackbone", **_T5_GEMMA),
    "T5Gemma2Backbone": _named("T5Gemma2Backbone", **_T5_GEMMA),
    "VGGBackbone": _named("VGGBackbone", stackwise_num_repeats=[1, 1], stackwise_num_filters=[8, 16]),
    "ViTBackbone": _named("ViTBackbone", **_IMAGE),
    "ViTDetBackbone": _VITDET,
    "VideoPrismBackbone": _named(
        "VideoPrismBackbone",
        num_frames=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=0,
        vocabulary_size=0,
        **_IMAGE,
    ),
    "XceptionBackbone": _named(
        "XceptionBackbone", stackwise_conv_filters=[[8, 8], [8, 16]], stackwise_pooling=[True, False]
    ),
    "BLIP2Backbone": lambda: _blip2(),
    "FluxBackbone": _named(
        "FluxBackbone",
        input_channels=8,
        mlp_ratio=2.0,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[2, 2, 4],
        theta=10000,
        use_bias=True,
        guidance_embed=True,
        image_shape=(6, 8),
        text_shape=(4, 8),
        image_ids_shape=(6, 3),
        text_ids_shape=(4, 3),
        y_shape=(8,),
    ),
    "Gemma3nBackbone": _named(
        "Gemma3nBackbone",
        text_vocab_size=VOCABULARY,
        text_hidden_size=16,
        num_hidden_layers=2,
        pad_token_id=0,
        intermediate_size=[32, 32],
        hidden_activation="gelu_approximate",
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=4,
        rope_theta=10000.0,
        max_position_embeddings=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=4,
        altup_num_inputs=2,
        laurel_rank=2,
    ),
    "MobileNetV5Backbone": lambda: _mobile_net_v5(),
    "PARSeqBackbone": _named(
        "PARSeqBackbone",
        image_encoder=_named("ViTBackbone", **_IMAGE),
        max_label_length=LENGTH,
        decoder_hidden_dim=16,
        num_decoder_layers=1,
        num_decoder_heads=2,
        decoder_mlp_dim=32,
    ),
    "SAMBackbone": lambda: _sam(),
    "SAM3PromptableConceptBackbone": lambda: _sam3(),
    "StableDiffusion3Backbone": lambda: _stable_diffusion(),
}


def _blip2() -> Any:
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
    return _models().BLIP2Backbone(encoder, former, text)


def _mobile_net_v5() -> Any:
    from keras_hub.src.models.mobilenetv5.mobilenetv5_builder import convert_arch_def_to_stackwise

    stages = [["er_r1_k3_s2_e2_c8"], ["uir_r1_a3_k3_s2_e2_c16"], ["mqa_r1_k3_h2_s1_d8_c16"]]
    return _models().MobileNetV5Backbone(
        **convert_arch_def_to_stackwise(stages), num_features=16, msfa_output_resolution=8, **_IMAGE
    )


def _sam() -> Any:
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
    return _models().SAMBackbone(_VITDET(), prompts, masks)


def _sam3() -> Any:
    import keras_hub

    layers, image = keras_hub.layers, {"image_shape": (56, 56, 3), "patch_size": 14}
    return _models().SAM3PromptableConceptBackbone(
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


def _stable_diffusion() -> Any:
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone

    models = _models()
    coder = {"num_filters": [32, 32, 32, 32], "num_blocks": [1, 1, 1, 1]}
    vae = VAEBackbone(**{f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in coder.items()})
    texts = [
        small(models.CLIPTextEncoder, max_sequence_length=LENGTH, intermediate_output_index=0, name=f"clip_{side}")
        for side in "lg"
    ]
    return models.StableDiffusion3Backbone(
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


def _mobile_net() -> Any:
    stages = {"expansion": 16, "num_filters": 8, "kernel_size": 3, "se_ratio": 0.25, "activation": "hard_swish"}
    return small(
        _models().MobileNetBackbone,
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


def _d_fine() -> Any:
    encoder = _named("HGNetV2Backbone", **_HGNET, out_features=["stage3", "stage4"])()
    return small(
        _models().DFineBackbone,
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


_TASKS: dict[str, Callable[[], Any]] = {
    "ViTImageClassifier": _named("ViTImageClassifier", backbone=_BACKBONES["ViTBackbone"], num_classes=5),
    "ResNetImageClassifier": _named("ResNetImageClassifier", backbone=_RESNET, num_classes=5),
    "SegFormerImageSegmenter": _named(
        "SegFormerImageSegmenter", backbone=_BACKBONES["SegFormerBackbone"], num_classes=3
    ),
    "DeepLabV3ImageSegmenter": _named(
        "DeepLabV3ImageSegmenter", backbone=_BACKBONES["DeepLabV3Backbone"], num_classes=3
    ),
    "RetinaNetObjectDetector": _named(
        "RetinaNetObjectDetector",
        backbone=_BACKBONES["RetinaNetBackbone"],
        num_classes=3,
        pre_logits_num_conv_layers=1,
    ),
    "BertTextClassifier": _named("BertTextClassifier", backbone=_BACKBONES["BertBackbone"], num_classes=3),
    "BertMaskedLM": _named("BertMaskedLM", backbone=_BACKBONES["BertBackbone"]),
}


MODELS: dict[str, Callable[[], Any]] = _BACKBONES | _TASKS
