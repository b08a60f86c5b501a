"Two processes on gloo: equal λ, φ and schedule, averaged hypergradients, different draws and validation batches"
import os,subprocess,sys
import pytest
from pathlib import Path

WORKER = '''
import os,sys,warnings; warnings.simplefilter('ignore')
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from fastai.distributed import DistributedDL
from fastai.callback.core import Callback
from functools import partial
from conftest import small_learner
from hba_fastai.exploit import through
from hba_fastai.replay import ScheduleCallback
from hba_fastai.search import HBACallback
from hba_fastai.transform import PolicyTransform
from hba_fastai.hypernet import HyperNet
from hba_fastai.schedule import Schedule

def broadcast(self, t, rank): # fastai's calls .cuda()
    t = torch.LongTensor(t); dist.broadcast(t, rank); return t.tolist()
DistributedDL._broadcast = broadcast
rank = int(os.environ['RANK'])
out = {}
def both(t):
    "The value on both ranks"
    l = [torch.zeros_like(t) for _ in range(2)]
    dist.all_gather(l, t.contiguous()); return l

raw,hypergradient = [],HyperNet.hypergradient # by z
def spy(*a, **k):
    l,g = hypergradient(*a, **k)
    raw.append(g.clone()); return l,g
HyperNet.hypergradient = spy

class See(Callback):
    order = 40
    def before_batch(self):
        if not self.training or 'eps' in out: return
        u,v = both(self.learn.hba.tfms[0].lam_i); out['eps'] = not torch.equal(u,v)
    def after_batch(self):
        if not self.training: return
        hba = self.learn.hba
        phi = [(f'phi{i}',p.detach()) for i,(p,_) in enumerate(hba.net.params)]
        weights = [(k,v) for k,v in self.learn.model.state_dict().items() if 'running' not in k and 'num' not in k]
        for name,t in [('lam',hba.lam.value), *phi, *weights]:
            u,v = both(t.float()); assert torch.equal(u,v), f'{name} differs between the ranks at step {self.learn.train_iter}'
        if raw:
            u,v = both(raw[-1]); out['raw'] = not torch.equal(u,v)
            out['z'] = partial(type(hba.bound).expected, hba.bound, sigma=hba.sigma) if hba.condition=='dose' else lambda l: l

learn = small_learner(seed=0)
hba = HBACallback(T_train=2, valid=float(sys.argv[3]) if sys.argv[3]!='0' else None, checkpoint='d', condition=sys.argv[4]) # no seed: it must be agreed upon
learn.path = type(learn.path)(sys.argv[2])
torch.manual_seed(100+rank)
with learn.distrib_ctx(sync_bn=False): learn.fit(3, 1e-2, cbs=[hba, See()])
u,v = both(hba.schedule.table)
assert torch.equal(u,v) and not torch.equal(hba.schedule.table[0], hba.schedule.table[-1])
assert out['eps'] and out['raw'], out
g = torch.stack(raw); u,v = both(g)
lam = hba.new_lam() # replay Adam with the mean of the two ranks' hypergradients
for m in (u+v)/2:
    for i in range(hba.moves): lam.step(through(out['z'], lam.value, m), hba.rate)
assert torch.allclose(lam.value, hba.lam.value, atol=1e-5), (lam.value-hba.lam.value).abs().max()
for dl in learn.dls.loaders: assert not any(isinstance(t, PolicyTransform) for t in dl.after_batch.fs)
small = small_learner(seed=1)
seen = []
class Lam(Callback):
    order = 40
    def before_batch(self):
        if self.training: seen.append(self.learn.schedule.tfms[0].lam_i.clone())
with small.distrib_ctx(sync_bn=False): small.fit(1, cbs=[ScheduleCallback(hba.schedule), Lam()])
u,v = both(seen[0]); assert not torch.equal(u,v)
dist.barrier(); dist.destroy_process_group() # else gloo's threads may still run when the interpreter ends, which aborts
print('rank', rank, 'ok', flush=True)
'''

def run(tmp_path, valid, condition, port):
    (tmp_path/'worker.py').write_text(WORKER)
    env = lambda r: {**os.environ, 'RANK': str(r), 'LOCAL_RANK': str(r), 'WORLD_SIZE': '2', 'ACCELERATE_USE_CPU': 'true',
                     'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port),
                     'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'GLOO_SOCKET_IFNAME': 'lo'}
    command = [sys.executable, str(tmp_path/'worker.py'), str(Path(__file__).parent), str(tmp_path), valid, condition]
    ps = [subprocess.Popen(command, env=env(r), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    try: outs = [p.communicate(timeout=240)[0] for p in ps]
    finally: [p.kill() for p in ps]
    for r,(p,o) in enumerate(zip(ps, outs)): assert p.returncode==0 and f'rank {r} ok' in o, o[-3000:]
    assert sorted(f.name for f in (tmp_path/'models').iterdir())==['d.pth','d_1.pth']

def free_port():
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def test_two_processes(tmp_path): run(tmp_path, '0', 'lambda', free_port())

@pytest.mark.slow
def test_two_processes_with_hold_out_and_dose(tmp_path): run(tmp_path, '0.3', 'dose', free_port())
