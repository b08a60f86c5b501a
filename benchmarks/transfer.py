"""Does a schedule serve where it was not found? Searched on one small task, replayed on a larger network, for longer, at more pixels, on other classes.

    python benchmarks/transfer.py --shifts Contrast Rotate --seeds 0 1     # runs what is missing, then writes results/transfer.md

The search: WRN-10-1 at 16 pixels, 2,560 images of five classes of CIFAR-10 as JPEG, 1,000 images of the same classes under a shift (planted.py) for
the hyper-steps, 16 epochs of 20 steps, the defaults of the package. Each place of `PLACES` differs from it in one thing; its test images are the 5,000
of its classes under the same shift. Controls: no policy, the start policy, TrivialAugment, and a random schedule of the same strength (controls.py).
results/transfer.jsonl holds a line per training: shift, seed, place, arm, error in percent, cpu_seconds.
"""
import argparse,gc,json,time
import torch
from functools import partial
from typing import NamedTuple
from fastai.callback.all import *
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torchvision.models import resnet18
from common import *
from controls import fixed,random_like
from planted import shifted
from hba_fastai.all import HBACallback,PolicyCallback,Schedule,ScheduleCallback,TrivialAugmentWide,array_dls

OUT = RESULTS/'transfer.jsonl'
EPOCHS,LR,WD = 16,0.1,5e-4

class Place(NamedTuple):
    "Where a schedule is used"
    what:str
    net:object=lambda: Bfloat16(wrn(10, 1, c=5))
    size:int=16
    epochs:int=EPOCHS
    classes:tuple=(0,1,2,3,4)

PLACES = {
    'same': Place('where it was found, other weights'),
    'resnet18': Place('resnet18', lambda: resnet18(num_classes=5)),
    'long': Place('three times the epochs', epochs=3*EPOCHS),
    'pixels': Place('32 pixels', size=32),
    'classes': Place('the other five classes', classes=(5,6,7,8,9))}

ARMS = {'none': 'flip + crop', 'start': '+ the start policy', 'trivial': '+ TrivialAugmentWide', 'random': '+ a random schedule of the same strength',
        'replay': '+ the schedule that was found'}

def sets_of(place, shift, seed, n_train=2560, n_target=1000):
    "Images to train, target images, test images; the last two under the shift"
    d = cifar()
    def of_classes(x, y, n=None):
        i = torch.isin(y, torch.tensor(place.classes)).nonzero()[:,0]
        i = i if n is None else i[torch.randperm(len(i), generator=torch.Generator().manual_seed(seed))[:n]]
        return small(x[i], place.size) if place.size!=32 else x[i],y[i]-place.classes[0]
    (x,y),test = of_classes(*d['train'], n_train+n_target),of_classes(*d['test'])
    target = x[n_train:],y[n_train:]
    return (x[:n_train],y[:n_train]),*[(shifted(v, shift, seed+i),c) for i,(v,c) in enumerate((target,test))]

def train(place, shift, seed, cb, weights):
    "One training with `cb`: the Learner, and its line"
    set_seed(weights)
    tfms = [Normalize.from_stats(MEAN, STD), FlipCrop(place.size//8)]
    dls = array_dls(*sets_of(place, shift, seed), vocab=[CLASSES[i] for i in place.classes], bs=128, batch_tfms=tfms)
    learn = Learner(dls, place.net(), opt_func=partial(SGD, mom=0.9, decouple_wd=False), wd=WD)
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    t = time.process_time()
    learn.fit(place.epochs, LR, cbs=[ParamScheduler({'lr': SchedCos(LR, 0.)}), NoValid(), *([cb] if cb else [])])
    return dict(error=round(error_on(learn, dls[2]), 3), cpu_seconds=round(time.process_time()-t, 1))

def found(shift, seed):
    "The schedule of a shift: searched for if it is not there"
    f = RESULTS/'schedules'/f'transfer_{shift}_seed{seed}.json'
    if f.exists(): return Schedule.load(f)
    hba = HBACallback(seed=seed)
    line = train(PLACES['same'], shift, seed, hba, seed)
    hba.schedule.save(f)
    append(dict(shift=shift, seed=seed, place='same', arm='search', **line, environment=environment()))
    return hba.schedule

def callback(arm, shift, seed):
    if arm=='none': return None
    if arm=='trivial': return PolicyCallback(TrivialAugmentWide(fill=0.), seed=seed)
    s = fixed() if arm=='start' else found(shift, seed)
    return ScheduleCallback(random_like(s, seed) if arm=='random' else s, seed=seed)

def append(line):
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with OUT.open('a') as f: f.write(json.dumps(line)+'\n')
    print({k: v for k,v in line.items() if k!='environment'}, flush=True)

def lines(): return [json.loads(l) for l in OUT.read_text().splitlines()] if OUT.exists() else []

def table() -> str:
    "Errors by place and arm, and the paired difference of each control from the replay"
    done,out = {(l['shift'],l['seed'],l['place'],l['arm']): l for l in lines()},[]
    for shift in dict.fromkeys(k[0] for k in done):
        seeds = sorted({k[1] for k in done if k[0]==shift})
        error = lambda s,p,a: done[shift,s,p,a]['error'] if (shift,s,p,a) in done else None
        out += [f"**{shift}**, seeds {', '.join(map(str, seeds))}", '', f"| place | {' | '.join(ARMS.values())} |", f"| --- |{' --- |'*len(ARMS)}"]
        for name,place in PLACES.items():
            def cell(a):
                pairs = [(error(s, name, a),error(s, name, 'replay')) for s in seeds]
                v,d = [e for e,_ in pairs if e is not None],[e-r for e,r in pairs if e is not None and r is not None]
                text = '{:.2f} ± {:.2f}'.format(*mean_se(v)) if len(v)>1 else ''.join(f'{e:.2f}' for e in v)
                return text + (' ({:+.2f} ± {:.2f})'.format(*mean_se(d)) if a!='replay' and len(d)>1 else '')
            out.append(f"| {place.what} | {' | '.join(map(cell, ARMS))} |")
        out.append('')
    return '\n'.join(['Test error in percent under the shift, mean ± standard error over seeds; in brackets what is above the replay, paired.', '', *out,
                      *made_by(l['environment'] for l in done.values())])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--shifts', nargs='+', default=['Contrast'])
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1])
    ap.add_argument('--places', nargs='+', default=list(PLACES), choices=list(PLACES))
    ap.add_argument('--table', action='store_true', help='only write the table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    for shift,seed,place,arm in [] if a.table else [(h,s,p,r) for h in a.shifts for s in a.seeds for p in a.places for r in ARMS]:
        what = dict(shift=shift, seed=seed, place=place, arm=arm)
        if any(what.items()<=l.items() for l in lines()): continue
        append({**what, **train(PLACES[place], shift, seed, callback(arm, shift, seed), seed+1000), 'environment': environment()})
        gc.collect()
    OUT.with_suffix('.md').write_text(table())
