"""What a search does, as numbers that a change of the code must keep: schedules, weights and test errors of short searches.

    python benchmarks/behaviour.py            # writes results/behaviour.json and results/behaviour.md
    python benchmarks/behaviour.py --check    # runs all again and says what differs
    python benchmarks/behaviour.py --settings default # only these, on purpose: what else the file has stays as it is

The tolerance is what rounding does: each search is run a second time from weights that differ by one part in 10^7, a unit in the last
place of float32, and what is allowed is three times the largest difference that any of the seeds showed. Hashes of the schedule and
of the weights agree bit for bit as long as versions and machine are the same; they are compared only then.
"""
import argparse,hashlib,json
from functools import partial
import torch
from fastai.callback.all import *
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from common import *
from hba_fastai.all import HBACallback,PBASpace,array_dls
from hba_fastai.data import digits_dls
from hba_fastai.session import digits_net

FILE = RESULTS/'behaviour.json'
SEEDS = 0,1,2
SETTINGS = {'default': HBACallback, 'paper': partial(HBACallback.paper, hlr=0.03)}

def photographs(seed):
    "1,000 training, 1,000 validation and 2,000 test photographs of 16 pixels"
    sets = [(F.interpolate(x[:n].float(), 16, mode='area').round().byte(),y[:n]) for (x,y),n in zip(reduced_cifar(seed), (1000,1000,2000))]
    return array_dls(*sets, vocab=CLASSES, bs=50, batch_tfms=Normalize.from_stats(MEAN, STD))

TASKS = { # data, network, epochs, learning rate
    'digits': (lambda seed: digits_dls(seed=seed), digits_net, 10, 0.05),
    'photographs': (photographs, lambda: wrn(10,1), 5, 0.05)}

def digest(tensors):
    "The first 16 digits of the hash of `tensors`"
    h = hashlib.sha256()
    for t in tensors: h.update(t.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]

def search(task, setting, seed, jitter=0.):
    "One search -> (its schedule, the Learner)"
    data,net,epochs,lr = TASKS[task]
    set_seed(seed) # the order of the items too
    dls = data(seed)
    learn = Learner(dls, net(), opt_func=partial(SGD, mom=0.9, decouple_wd=False), wd=5e-4)
    with torch.no_grad():
        g = torch.Generator().manual_seed(seed)
        for p in learn.model.parameters(): p.mul_(1 + jitter*torch.randn(p.shape, generator=g))
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    learn.fit_one_cycle(epochs, lr, cbs=SETTINGS[setting](seed=seed))
    return learn.hba_schedule,learn

def measured(task, setting, seed, jitter=0.):
    "One search -> its numbers"
    schedule,learn = search(task, setting, seed, jitter)
    weights = list(learn.model.state_dict().values())
    norms = {k: round(v.float().norm().item(), 5) for k,v in learn.model.state_dict().items() if v.dim()}
    return dict(task=task, setting=setting, seed=seed, test_error=round(error_on(learn, learn.dls[2]), 3), weight_norms=norms,
                last=[round(v, 6) for v in schedule.table[-1].tolist()], hash_schedule=digest([schedule.table]), hash_weights=digest(weights))

def apart(a, b):
    "How far two runs are from each other: last λ in parts of the ranges (mean), norms of the weights relative to all, test error in percent points"
    width = [hi-lo for lo,hi in PBASpace().ranges]
    schedule = sum(abs(x-y)/w for x,y,w in zip(a['last'], b['last'], width))/len(width)
    norms = [torch.tensor(list(o['weight_norms'].values())) for o in (a,b)]
    weights = ((norms[0]-norms[1]).norm()/norms[1].norm()).item()
    return dict(schedule=schedule, weights=weights, test_error=abs(a['test_error']-b['test_error']))

def all_runs(jitter=0., settings=SETTINGS): return [measured(t, s, seed, jitter) for t in TASKS for s in settings for seed in SEEDS]

def of(task, setting, runs): return [r for r in runs if r['task']==task and r['setting']==setting]

def table(d):
    "The results as Markdown"
    out = ['| task | setting | seed | test error % | schedule, hash | weights, hash |', '| --- '*6+'|']
    out += [f"| {r['task']} | {r['setting']} | {r['seed']} | {r['test_error']} | {r['hash_schedule']} | {r['hash_weights']} |" for r in d['runs']]
    out += ['', 'Allowed differences:', '', '| task | setting | schedule, part of the ranges | weights, relative | test error, points |', '| --- '*5+'|']
    out += [f"| {k.replace(' ', ' | ')} | {t['schedule']:.2g} | {t['weights']:.2g} | {t['test_error']:.2f} |" for k,t in d['tolerance'].items()]
    return '\n'.join([*out, '', footer(d['environment'])])

def write(settings):
    a,b = all_runs(0., settings),all_runs(1e-7, settings)
    groups = [(t,s) for t in TASKS for s in settings]
    worst = lambda t,s: [apart(x, y) for x,y in zip(of(t,s,a), of(t,s,b))]
    tolerance = {f'{t} {s}': {k: 3*max(d[k] for d in worst(t,s)) for k in ('schedule','weights','test_error')} for t,s in groups}
    old = json.loads(FILE.read_text()) if FILE.exists() else dict(tolerance={}, runs=[])
    runs = {(r['task'],r['setting'],r['seed']): r for r in [*old['runs'],*a]}
    d = dict(environment=environment(), tolerance={**old['tolerance'],**tolerance}, runs=list(runs.values()))
    save_json(FILE, d)
    FILE.with_suffix('.md').write_text(table(d)+'\n')

def check():
    "Compare a new run of all with the file"
    d,here = json.loads(FILE.read_text()),environment()
    same = all(d['environment'][k]==here[k] for k in ('torch','fastai','python','machine','threads'))
    for old,new in zip(d['runs'], all_runs()):
        far,allowed = apart(new, old),d['tolerance'][f"{old['task']} {old['setting']}"]
        bits = [k for k in ('hash_schedule','hash_weights') if same and old[k]!=new[k]]
        verdict = 'DIFFERS' if any(far[k]>allowed[k] for k in far) else 'within rounding' if bits or not same else 'bit for bit'
        print(old['task'], old['setting'], old['seed'], verdict, {k: f'{v:.2g}' for k,v in far.items()}, flush=True)

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--check', action='store_true', help='compare instead of writing')
    ap.add_argument('--settings', nargs='+', default=list(SETTINGS), choices=list(SETTINGS))
    a = ap.parse_args()
    torch.set_num_threads(1)
    check() if a.check else write(a.settings)
