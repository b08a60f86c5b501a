"Digits of scikit-learn, a schedule that does nothing at the start, and what it did when"
import torch
from hba_fastai.pba import PBAPolicy
from hba_fastai.schedule import Schedule
from hba_fastai.space import PBASpace
from sklearn.datasets import load_digits

SPACE,EPOCHS,STEPS = PBASpace(),5,8
SCHEDULE = Schedule([0,1], SPACE.values(torch.stack([torch.full((54,), -20.), torch.cat([torch.full((30,), -3.),torch.zeros(24)])])))

def digits():
    "Training and validation images (N,1,16,16) in bytes, with their labels"
    d = load_digits()
    x = torch.tensor(d.images/16*255).round().byte()[:,None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    y = torch.tensor(d.target)
    return (x[:256],y[:256]),(x[256:384],y[256:384])

def share_changed(seen:list, originals) -> float:
    "Share of the images in the batches `seen` that are not among `originals`"
    known = {o.numpy().tobytes() for o in originals}
    return sum(o.numpy().tobytes() not in known for b in seen for o in b)/sum(map(len, seen))

def check_moves(seen:list, originals):
    "The training batches `seen` were hardly augmented in the first epoch, and in the last one they were"
    assert len(seen)==EPOCHS*STEPS
    operations = [PBAPolicy().expected(SCHEDULE.lam(i/len(seen)), SCHEDULE.sigma)[:15].sum().item() for i in range(STEPS)]
    first,last = (share_changed(o, originals) for o in (seen[:STEPS],seen[-STEPS:]))
    error = (0.25/len(originals))**0.5 # at most, of each share
    assert first<sum(operations)/STEPS + 5*error and last-first>5*2**0.5*error, (first,last)
