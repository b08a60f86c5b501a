"""A second estimate of where λ should go, from the last layer: does it keep a search from narrowing where nothing differs?

    python benchmarks/last_layer.py --seeds 100 101    # runs what is missing, then writes results/last_layer.md

The response sees how the target differs, not how broad augmentation regularises. What does: how well the last layer's gradient of a training sample agrees
with that of the validation batch, regressed on the dose of the sample. Both are at hand: activations and residuals of the two batches. `weight` is the
share of the hypergradient in the direction of λ, each of the two divided by the running mean of its norm; 1 is the hypergradient alone, as in the package.
Digits without a shift (no_shift.py) and under three shifts (payoff.py, one fit); a screening on seeds of which only one_fit.md uses one.
results/last_layer.jsonl: weight, n_train, steps, shift, seed, error (of the search's own network), replay (of its schedule), mean_p, cpu_seconds.
"""
import argparse,gc,json,time
from itertools import product
import torch
from torch import nn,Tensor
import torch.nn.functional as F
from fastai.torch_core import get_model
from common import RESULTS,environment,made_by
from no_shift import CELLS,sets
from payoff import Cell,Replay,head,in_package,judge,pm,train
from hba_fastai.all import HBACallback
from hba_fastai.exploit import through

FILE = RESULTS/'last_layer.jsonl'
WEIGHTS,SHIFTS = [1.,0.5,0.],['Contrast','Rotate','noise']
KEEP,RIDGE = 0.98,0.1 # of the running moments; of the regression

class Aligned(HBACallback):
    "A search whose λ also follows the agreement of last-layer gradients"
    def __init__(self, weight:float, **kwargs):
        super().__init__(**kwargs)
        self.weight,self.moments,self.norms = weight,None,None

    def attach(self):
        super().attach()
        last = [m for m in get_model(self.model).modules() if isinstance(m, nn.Linear)][-1]
        self.undo.callback(last.register_forward_pre_hook(lambda m, x: setattr(self, 'hidden', x[0].detach())).remove)

    def z_batch(self):
        self.doses = super().z_batch()
        return self.doses

    def after_pred(self):
        if self.training: self.batch = self.hidden,residuals(self.learn.pred, self.learn.yb[0].as_subclass(Tensor))

    def hyper_step(self):
        b = next(self.stream)
        loss,g = self.net.hypergradient(get_model(self.model), lambda: self.noting(b), self.z(self.lam.value), lambda z: z)
        both = torch.stack([self.disagreement(), g])
        norms = both.norm(dim=1)
        self.norms = norms if self.norms is None else KEEP*self.norms + (1-KEEP)*norms
        move = torch.tensor([1-self.weight,self.weight]) @ (both/self.norms[:,None].clamp(min=1e-12))
        for i in range(self.moves): ok = self.lam.step(through(self.z, self.lam.value, move), self.rate, is_news=not i)
        self.hyper_steps.append((loss,ok))
        self.net.move_to(self.z(self.lam.value))

    def noting(self, b):
        p = get_model(self.model)(b[0])
        self.valid_batch = self.hidden,residuals(p, b[1])
        return F.cross_entropy(p, b[1])

    def disagreement(self) -> Tensor: # (n,)
        "Minus the slope of a training sample's agreement with the validation batch over its dose, by ridge regression on running moments"
        (h,d),(hv,dv) = self.batch,self.valid_batch
        agreement = ((d @ (dv.T@hv/len(dv)))*h).sum(1) + d @ dv.mean(0)
        z = self.doses
        new = [z.mean(0),agreement.mean(),(z*agreement[:,None]).mean(0),z.T@z/len(z)]
        self.moments = new if self.moments is None else [KEEP*a + (1-KEEP)*b for a,b in zip(self.moments, new)]
        mz,ma,mza,mzz = self.moments
        cov = mzz-torch.outer(mz, mz)
        return -torch.linalg.solve(cov + torch.diag(RIDGE*cov.diagonal().clamp(min=1e-8)+1e-6), mza-mz*ma)

def residuals(p, y): return F.softmax(p.detach().as_subclass(Tensor), 1)-F.one_hot(y, p.shape[1])

def run_plain(weight, n, steps, seed):
    source,valid,test = sets(n, seed)
    net,hba = in_package(source, valid, steps, seed, lambda dl: Aligned(weight, valid=dl, seed=seed))
    again = train(source, steps, seed+1000, Replay(hba.schedule))
    return judge(net, test)[0],judge(again, test)[0],hba

def run_shift(weight, shift, seed):
    cell = Cell(900, shift, seed, 100)
    net,hba = in_package(cell.source, cell.target, 900, seed, lambda dl: Aligned(weight, target=dl, seed=seed))
    return judge(net, cell.moved_test)[0],None,hba

def run(weight, n, steps, shift, seed):
    t = time.process_time()
    error,replay,hba = run_shift(weight, shift, seed) if shift else run_plain(weight, n, steps, seed)
    mean_p = torch.tensor([v for k,v in hba.schedule.values(1.).items() if k.endswith('.p')]).mean().item()
    return dict(weight=weight, n_train=n, steps=steps, shift=shift, seed=seed, error=error, replay=replay, mean_p=round(mean_p, 3),
                cpu_seconds=round(time.process_time()-t, 1))

def lines(): return [json.loads(l) for l in FILE.read_text().splitlines()] if FILE.exists() else []
def runs(): return {tuple(r[k] for k in ('weight','n_train','steps','shift','seed')): r for r in lines() if 'weight' in r}
TASKS = [*[(n,steps,None) for n,steps in CELLS], *[(500,900,s) for s in SHIFTS]]

def table():
    rs = runs()
    out = ['Error in percent on unseen digits: mean ± standard error (number of seeds). Without a shift: the replayed schedule, and the '
           'network of the search; under a shift: `HBACallback(target=...)`, one fit with 100 target images. Weight 1 is the hypergradient alone.','']
    out += head('weight of the hypergradient', *[f'{n} images, {steps} steps: replay / search' if s is None else s for n,steps,s in TASKS])
    for w in WEIGHTS:
        of = lambda task, what: pm([r[what] for k,r in rs.items() if k[0]==w and k[1:4]==task and r[what] is not None])
        out.append(f"| {w:g} | {' | '.join(' / '.join(filter(None, [of(t, 'replay'),of(t, 'error')])) for t in TASKS)} |")
    out += ['',*made_by([l['environment'] for l in lines() if 'environment' in l])]
    FILE.with_suffix('.md').write_text('\n'.join(out))

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--seeds', type=int, nargs='+', default=[100,101])
    a = ap.parse_args()
    torch.set_num_threads(1)
    with FILE.open('a') as f: f.write(json.dumps(dict(environment=environment()))+'\n')
    for seed,task,weight in product(a.seeds, TASKS, WEIGHTS):
        if (weight,*task,seed) in runs(): continue
        r = run(weight, *task, seed)
        with FILE.open('a') as f: f.write(json.dumps(r)+'\n')
        print(r, flush=True)
        gc.collect()
    table()
