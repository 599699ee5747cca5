"""PODNet: Douillard et al., "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental Learning", ECCV 2020.

What every stage of the backbone puts out is held to what it was, pooled along each side; classes have several proxies;
after a phase, the classifier is tuned on as many images of new classes as of old ones.
"""

import math
from collections import Counter

from torch import Tensor

from convs.resnet import ResNet
from models.base import Learner
from models.losses import nca, pod_flat, pod_spatial
from models.networks import Outputs, ProxyNet
from models.stages import Defaults, Schedule, Stage

MARGIN = 0.6  # the paper's delta


class PODNet(Learner, name="podnet"):
    defaults = Defaults(epochs=160, weight_decay=5e-4, init_epoch=160, scheduler="cosine")
    keeps_old_network = True
    plain_phase_0 = False

    def build_network(self, backbone: ResNet) -> ProxyNet:
        return ProxyNet(backbone, self.config.nb_proxy)

    def stages(self) -> list[Stage]:
        """`training`, with the old classes' proxies fixed; `balanced`: the classifier alone.

        The balanced set is the memory and, drawn at random, as many images of each new class as an old one has there.
        """
        (stage,) = super().stages()
        if self.phase == 0:
            return [stage]
        network, exemplars = self.network, self.memory.items()
        each = max(Counter(item.target for item in exemplars).values(), default=1)
        order = self.rng("balanced").permutation(len(stage.items)).tolist()
        new = [stage.items[index] for index in order if stage.items[index].role == "new"]
        picked = [item for target in self.data.phase_targets(self.phase) for item in of_class(new, target)[:each]]
        c = self.config
        return [
            stage._replace(
                parameters=[*network.backbone.parameters(), network.head.eta, network.head.proxies[-1]],
            ),
            Stage(
                "balanced",
                [*picked, *exemplars],
                Schedule(c.ft_epochs, c.ft_lrate, None, 1.0, self.schedule().weight_decay),
                parameters=list(network.head.parameters()),
            ),
        ]

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """NCA + f (lambda_c POD-spatial + lambda_f POD-flat), f = sqrt(all classes / new classes)."""
        classification = nca(outputs.logits, targets, MARGIN)
        if self.old_network is None:
            return classification
        c, old = self.config, self.old_outputs(images)
        spatial = c.lambda_c_base * pod_spatial(outputs.maps, old.maps)
        flat = c.lambda_f_base * pod_flat(outputs.features, old.features)
        return classification + math.sqrt(self.nb_seen / self.nb_new) * (spatial + flat)


def of_class(items, target: int) -> list:
    """Those of a class, in the order given."""
    return [item for item in items if item.target == target]
