"""Small models of keras-hub with random weights: every backbone that can be built, and a task model of each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.keras_hub_composed import blip2, d_fine, mobile_net, mobile_net_v5, sam, sam3, stable_diffusion
from experiments.keras_hub_small import HGNET, IMAGE, LENGTH, SIDE, VITDET, VOCABULARY, named

_TEXTS = (
    "Albert Bart Bert Bloom DebertaV3 DistilBert ESM FNet Falcon GPT2 GPTNeoX Gemma GptOss Llama Llama3 Mistral "
    "Mixtral OPT Phi3 Qwen Qwen3 Qwen3Moe Qwen3_5 Qwen3_5Moe QwenMoe RWKV7 Roberta RoformerV2 T5 Whisper XLMRoberta "
    "XLNet"
).split()
_RESNET = named(
    "ResNetBackbone",
    input_conv_filters=[64],
    input_conv_kernel_sizes=[7],
    stackwise_num_filters=[64, 64, 64, 64],
    stackwise_num_blocks=[1, 1, 1, 1],
    stackwise_num_strides=[1, 2, 2, 2],
    block_type="basic_block",
)
_MIT = named(
    "MiTBackbone",
    hidden_dims=[8, 16],
    layerwise_depths=[1, 1],
    layerwise_num_heads=[1, 2],
    layerwise_sr_ratios=[2, 1],
    layerwise_patch_sizes=[7, 3],
    layerwise_strides=[4, 2],
    max_drop_path_rate=0.1,
    **IMAGE,
)
_ENCODERS = {**IMAGE, "patch_size": 16}
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
_DINO = named(
    "DINOV2Backbone", num_layers=4, patch_size=8, position_embedding_shape=(64, 64, 3), image_shape=(64, 64, 3)
)
_BACKBONES: dict[str, Callable[[], Any]] = {
    **{f"{name}Backbone": named(f"{name}Backbone") for name in _TEXTS},
    "BASNetBackbone": named(
        "BASNetBackbone", image_encoder=_RESNET, num_classes=1, projection_filters=8, image_shape=(64, 64, 3)
    ),
    "CLIPBackbone": named(
        "CLIPBackbone",
        vision_encoder=named("CLIPVisionEncoder", **_ENCODERS),
        text_encoder=named("CLIPTextEncoder", max_sequence_length=LENGTH),
    ),
    "CSPNetBackbone": named(
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
    "DFineBackbone": d_fine,
    "DINOV2Backbone": _DINO,
    "DINOV3Backbone": named("DINOV3Backbone", **IMAGE),
    "DeepLabV3Backbone": named(
        "DeepLabV3Backbone",
        image_encoder=_RESNET,
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P5",
        upsampling_size=8,
        dilation_rates=[1, 2],
        projection_filters=8,
        image_shape=(64, 64, 3),
    ),
    "DeiTBackbone": named("DeiTBackbone", **IMAGE),
    "DenseNetBackbone": named("DenseNetBackbone", stackwise_num_repeats=[1, 2], growth_rate=8),
    "DepthAnythingBackbone": named(
        "DepthAnythingBackbone",
        image_encoder=_DINO,
        reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_dims=[8, 8, 8, 8],
        fusion_hidden_dim=8,
        head_hidden_dim=8,
        head_in_index=-1,
        feature_keys=["stage1", "stage2", "stage3", "stage4"],
    ),
    "EdRecBackbone": named("EdRecBackbone", vocab_size=VOCABULARY, num_layers_enc=1, num_layers_dec=1),
    "EfficientNetBackbone": named(
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
    "ElectraBackbone": named("ElectraBackbone", vocab_size=VOCABULARY),
    "Gemma3Backbone": named("Gemma3Backbone", image_size=SIDE),
    "Gemma4Backbone": named("Gemma4Backbone", image_size=SIDE),
    "HGNetV2Backbone": named("HGNetV2Backbone", **HGNET, **IMAGE),
    "MetaCLIP2Backbone": named(
        "MetaCLIP2Backbone",
        vision_encoder=named("MetaCLIP2VisionEncoder", **_ENCODERS),
        text_encoder=named("MetaCLIP2TextEncoder", max_sequence_length=LENGTH),
    ),
    "MiTBackbone": _MIT,
    "MobileNetBackbone": mobile_net,
    "MoonshineBackbone": named(
        "MoonshineBackbone",
        filter_dim=16,
        encoder_num_layers=1,
        decoder_num_layers=1,
        encoder_num_heads=2,
        decoder_num_heads=2,
    ),
    "PaliGemmaBackbone": named(
        "PaliGemmaBackbone",
        image_size=SIDE,
        vit_patch_size=16,
        vit_num_heads=2,
        vit_hidden_dim=16,
        vit_intermediate_dim=32,
        vit_num_layers=1,
    ),
    "ResNetBackbone": _RESNET,
    "RetinaNetBackbone": named(
        "RetinaNetBackbone", image_encoder=_RESNET, min_level=3, max_level=5, use_p5=False, image_shape=(64, 64, 3)
    ),
    "SegFormerBackbone": named("SegFormerBackbone", image_encoder=_MIT, projection_filters=8),
    "SigLIPBackbone": named(
        "SigLIPBackbone",
        vision_encoder=named("SigLIPVisionEncoder", **_ENCODERS),
        text_encoder=named("SigLIPTextEncoder", max_sequence_length=LENGTH, projection_dim=16),
        projection_dim=16,
    ),
    "SmolLM3Backbone": named("SmolLM3Backbone", **_SMOL),
    "SwinTransformerBackbone": named(
        "SwinTransformerBackbone",
        embed_dim=8,
        depths=(2, 2),
        num_heads=(1, 2),
        window_size=4,
        patch_size=4,
        **IMAGE,
    ),
    "T5GemmaBackbone": named("T5GemmaBackbone", **_T5_GEMMA),
    "T5Gemma2Backbone": named("T5Gemma2Backbone", **_T5_GEMMA),
    "VGGBackbone": named("VGGBackbone", stackwise_num_repeats=[1, 1], stackwise_num_filters=[8, 16]),
    "ViTBackbone": named("ViTBackbone", **IMAGE),
    "ViTDetBackbone": VITDET,
    "VideoPrismBackbone": named(
        "VideoPrismBackbone",
        num_frames=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=0,
        vocabulary_size=0,
        **IMAGE,
    ),
    "XceptionBackbone": named(
        "XceptionBackbone", stackwise_conv_filters=[[8, 8], [8, 16]], stackwise_pooling=[True, False]
    ),
    "BLIP2Backbone": blip2,
    "FluxBackbone": named(
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
    "Gemma3nBackbone": named(
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
    "MobileNetV5Backbone": mobile_net_v5,
    "PARSeqBackbone": named(
        "PARSeqBackbone",
        image_encoder=named("ViTBackbone", **IMAGE),
        max_label_length=LENGTH,
        decoder_hidden_dim=16,
        num_decoder_layers=1,
        num_decoder_heads=2,
        decoder_mlp_dim=32,
    ),
    "SAMBackbone": sam,
    "SAM3PromptableConceptBackbone": sam3,
    "StableDiffusion3Backbone": stable_diffusion,
}


_TASKS: dict[str, Callable[[], Any]] = {
    "ViTImageClassifier": named("ViTImageClassifier", backbone=_BACKBONES["ViTBackbone"], num_classes=5),
    "ResNetImageClassifier": named("ResNetImageClassifier", backbone=_RESNET, num_classes=5),
    "SegFormerImageSegmenter": named(
        "SegFormerImageSegmenter", backbone=_BACKBONES["SegFormerBackbone"], num_classes=3
    ),
    "DeepLabV3ImageSegmenter": named(
        "DeepLabV3ImageSegmenter", backbone=_BACKBONES["DeepLabV3Backbone"], num_classes=3
    ),
    "RetinaNetObjectDetector": named(
        "RetinaNetObjectDetector",
        backbone=_BACKBONES["RetinaNetBackbone"],
        num_classes=3,
        pre_logits_num_conv_layers=1,
    ),
    "BertTextClassifier": named("BertTextClassifier", backbone=_BACKBONES["BertBackbone"], num_classes=3),
    "BertMaskedLM": named("BertMaskedLM", backbone=_BACKBONES["BertBackbone"]),
}


MODELS: dict[str, Callable[[], Any]] = _BACKBONES | _TASKS
