"""Weights that another callback of the trainer replaces while it trains."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toy import Toy, make_data
from trainers import quiet_trainer

from laser_callback import LaserCallback


@pytest.mark.parametrize("all_of_them", [True, False])
def test_pruning_of_what_is_cut_is_refused_before_training(all_of_them: bool) -> None:
    module = Toy()
    layers = module.net.encoder.layers
    places = None if all_of_them else [(layers[1].linear1, "weight")]
    pruning = ModelPruning("l1_unstructured", places, amount=0.5)
    before = layers[1].linear1.weight.detach().clone()
    trainer = quiet_trainer(pruning, LaserCallback("1.fc_in@0.5", loops="fit", report=False))
    with pytest.raises(MisconfigurationException, match=r"layers\.1\.linear1.*ModelPruning"):
        trainer.fit(module, make_data(), make_data())
    assert layers[1].linear1.weight.equal(before)


def test_pruning_of_other_matrices_goes_on() -> None:
    module = Toy()
    pruning = ModelPruning("l1_unstructured", [(module.net.encoder.layers[0].linear1, "weight")], amount=0.5)
    trainer = quiet_trainer(pruning, callback := LaserCallback("1.fc_in@0.5", loops="fit", report=False), max_epochs=2)
    trainer.fit(module, make_data(), make_data())
    assert callback.result is not None
