"A schedule in a training with the `Trainer` of Hugging Face, whose loader has workers"
import pytest, torch
from common import EPOCHS,SCHEDULE,check_moves,digits,share_changed
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import Trainer,TrainerCallback,TrainingArguments,ViTConfig,ViTForImageClassification

class Items(Dataset):
    def __init__(self, x, y, tfms): self.x,self.y,self.tfms = x,y,tfms
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return dict(pixel_values=self.tfms(self.x[i]), labels=self.y[i])

class MoveSchedule(TrainerCallback):
    def __init__(self, augment): self.augment = augment
    def on_step_begin(self, args, state, control, **kwargs): self.augment.pct = state.global_step/state.max_steps

@pytest.mark.parametrize('workers', [0,2])
def test_trainer(tmp_path, workers):
    train,valid = digits()
    augment = SCHEDULE.torchvision(0., seed=0, mean=0.)
    to_floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    train_ds,valid_ds = Items(*train, v2.Compose([augment, *to_floats])),Items(*valid, v2.Compose(to_floats))
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_channels=1, hidden_size=16, num_hidden_layers=1,
                                                num_attention_heads=2, intermediate_size=32, num_labels=10))
    seen = {True: [],False: []}
    model.register_forward_pre_hook(lambda m, args, kw: seen[m.training].append((kw['pixel_values']*255).round().byte()), with_kwargs=True)
    args = TrainingArguments(tmp_path, num_train_epochs=EPOCHS, per_device_train_batch_size=32, per_device_eval_batch_size=32, eval_strategy='epoch',
        dataloader_num_workers=workers, dataloader_persistent_workers=workers>0, use_cpu=True, report_to='none', save_strategy='no', disable_tqdm=True)
    trainer = Trainer(model, args, train_dataset=train_ds, eval_dataset=valid_ds, callbacks=[MoveSchedule(augment)])
    trainer.train()
    assert augment.pct==pytest.approx(39/40)
    check_moves(seen[True], train[0])
    assert share_changed(seen[False], valid[0])==0
