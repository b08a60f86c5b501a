"A schedule in a training with Lightning"
import lightning as L
import pytest, torch
import torch.nn.functional as F
from common import EPOCHS,SCHEDULE,check_moves,digits,share_changed
from torch import nn
from torch.utils.data import DataLoader,TensorDataset

class Classifier(L.LightningModule):
    def __init__(self, schedule):
        super().__init__()
        self.augment = schedule.transform(0., seed=0, mean=0.)
        self.net = nn.Sequential(nn.Conv2d(1,8,3,2,1), nn.ReLU(), nn.Flatten(), nn.Linear(512,10))

    def forward(self, x): return self.net(self.augment(x)/255)
    def training_step(self, batch, i): return F.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, i): self.log('valid_loss', F.cross_entropy(self(batch[0]), batch[1]))
    def configure_optimizers(self): return torch.optim.Adam(self.parameters(), lr=1e-3)

class MoveSchedule(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, i):
        module.augment.pct = trainer.global_step/trainer.estimated_stepping_batches

@pytest.mark.parametrize('precision', ['32-true','bf16-mixed'])
def test_lightning(tmp_path, precision):
    L.seed_everything(0)
    train,valid = digits()
    loaders = [DataLoader(TensorDataset(*o), batch_size=32, shuffle=o is train) for o in (train,valid)]
    module,seen,progress = Classifier(SCHEDULE),{True: [],False: []},[]
    def see(augment, args, out):
        seen[augment.training].append(out)
        if augment.training: progress.append(augment.pct)
    module.augment.register_forward_hook(see)
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=MoveSchedule(), precision=precision, accelerator='cpu', logger=False, default_root_dir=tmp_path,
                        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=2)
    trainer.fit(module, *loaders)
    assert progress==pytest.approx([i/40 for i in range(40)])
    check_moves(seen[True], train[0])
    assert share_changed(seen[False], valid[0])==0
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)['state_dict']
    assert [k for k in saved if k.startswith('augment')]==[]
