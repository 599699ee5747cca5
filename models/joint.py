"""Joint: the upper bound.  Each phase trains a fresh network on all images of all classes seen so far."""

from torch import Tensor
from torch.nn import functional as F

from models.networks import IncrementalNet, Outputs
from models.training.method import Method
from models.training.stages import Defaults, Stage


class Joint(Method, name="joint"):
    network: IncrementalNet
    defaults = Defaults(epochs=200)
    uses_memory = False
    reads_old_images = True

    def stages(self) -> list[Stage]:
        """Every phase is trained as phase 0 is (init_epoch, init_lr, ...)."""
        items = [item for phase in range(self.phase + 1) for item in self.data.new_items(phase)]
        return [Stage("training", items, self.schedule(as_phase_0=True))]

    def before_stage(self, stage: Stage) -> None:
        if self.phase > 0:
            fresh = self.fresh_network(self.config, self.data)
            fresh.grow(self.nb_seen)
            if self.config.freeze_backbone:
                fresh.backbone = self.network.backbone
            self.network.load_state_dict(fresh.state_dict())

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """CE over all classes."""
        return F.cross_entropy(outputs.logits, targets)
