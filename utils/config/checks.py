"""What is wrong with a config's values together, as far as can be told without the data."""

from collections.abc import Iterator

from utils.config.schema import Config, MethodInfo


def conflicts(config: Config, method: MethodInfo) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(message, the keys that it is about)."""
    yield from _memory(config, method)
    yield from _backbone(config, method)
    if config.init_epoch == 0 and not config.pretrained:
        yield "init_epoch must be at least 1, unless pretrained is true", ("init_epoch", "pretrained")
    parts, size = config.accumulate_batches, config.batch_size
    if parts > size:
        message = f"accumulate_batches: a batch of {size} images can't be processed in {parts} parts"
        yield message, ("accumulate_batches", "batch_size")
    if (config.syn_per_class != 0 or config.augmentation_prob > 0) and config.augmentations_per_image < 1:
        message = "augmentations_per_image must be at least 1 where syn_per_class or augmentation_prob is above 0"
        yield message, ("augmentations_per_image", "syn_per_class", "augmentation_prob")
    if config.val_per_class and config.memory_only:
        message = "val_per_class: memory_only may lose the train images that are held out; set one of them"
        yield message, ("val_per_class", "memory_only")
    if (config.class_order or not config.shuffle) and len(config.seed) > 1:  # the runs would be equal
        key, words = ("class_order", "class_order is") if config.class_order else ("shuffle", "shuffle: false gives")
        yield f"{words} one order of classes; seed must be one number, not {config.seed}", (key, "seed")
    if hasattr(config.settings, "check"):
        for message in config.settings.check(config):
            yield message, ("model_name", message.partition(":")[0])


def _memory(config: Config, method: MethodInfo) -> Iterator[tuple[str, tuple[str, ...]]]:
    real, synthetic, in_bytes = config.real_per_class, config.syn_per_class, config.budget_in == "bytes"
    if in_bytes and not (config.memory_bytes_per_class and config.fixed_memory):
        message = "budget_in: bytes needs memory_bytes_per_class, and fixed_memory: true"
        yield message, ("budget_in", "memory_bytes_per_class", "fixed_memory")
    if in_bytes and real is None and synthetic != 0:
        message = "real_per_class must be given where budget_in is bytes and syn_per_class is not 0"
        yield message, ("real_per_class", "syn_per_class", "budget_in")
    if synthetic == "fill" and not config.fixed_memory:
        message = 'syn_per_class: "fill" needs fixed_memory: true; with a shared budget it is a ratio'
        yield message, ("syn_per_class", "fixed_memory")
    if not method.uses_memory:
        return
    if not config.fixed_memory:
        if not config.memory_size:
            message = "memory_size must be given where fixed_memory is false: the units that all classes share"
            yield message, ("fixed_memory", "memory_size", "model_name")
    elif real is not None:
        # What a prompt costs depends on the images, and is checked with them; the cost of real exemplars is known here.
        budget = config.memory_per_class
        if not in_bytes and real > budget:
            message = (
                f"real_per_class: {real} real exemplars cost {real} units, more than memory_per_class = {budget:g}"
            )
            yield message, ("real_per_class", "memory_per_class", "fixed_memory")
        least = method.least_exemplars
        if synthetic != "fill" and real + synthetic < least:
            message = f"real_per_class + syn_per_class must be at least {least}: {method.name} needs exemplars"
            yield message, ("real_per_class", "syn_per_class", "model_name", "fixed_memory")


def _backbone(config: Config, method: MethodInfo) -> Iterator[tuple[str, tuple[str, ...]]]:
    is_library = "/" in config.convnet_type
    if method.needs_stages and is_library:
        message = f"{method.name} needs the stages of a ResNet: set convnet_type to resnet18, resnet32, ..."
        yield message, ("convnet_type", "model_name")
    if config.image_size and not is_library:
        yield "image_size is for convnet_type torchvision/... and timm/...", ("image_size", "convnet_type")
    if config.freeze_backbone and config.backbone_lrate:
        message = "backbone_lrate: freeze_backbone leaves the backbone without a learning rate; set one of them"
        yield message, ("backbone_lrate", "freeze_backbone")
