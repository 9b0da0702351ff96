"""Loading a v1 checkpoint into a v2 model."""

from detectron2.checkpoint import DetectionCheckpointer

from ..layers import ModulatedDeformConv2d


class Checkpointer(DetectionCheckpointer):
    """Detectron2's, which leaves out every tensor of another shape; v1 offsets fit into a v2 model all the same.

    Only needed for checkpoints with our own names: those of Detectron2's dconv models pass its check of shapes.
    """

    def _load_model(self, checkpoint):
        for name, layer in self.model.named_modules():
            if isinstance(layer, ModulatedDeformConv2d):
                for prefix in (f"{name}.", f"module.{name}."):  # saved from a distributed model
                    layer.accept_v1(checkpoint["model"], prefix)
        return super()._load_model(checkpoint)
