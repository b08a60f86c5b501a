"""HBA beside what anybody can have for nothing: fixed, random and published policies, same training, same seeds.

    python benchmarks/controls.py --task wrn16 --epochs 60 --seeds 0 1 2 [--worker 0/2]     # runs what is missing, then writes the table

Tasks: wrn16 is WRN-16-1 in bfloat16 on 4,000/10,000/10,000 images of CIFAR-10 JPEG; small is WRN-10-1 on the same at 16 pixels.
Batch 128, SGD as in the paper's Table 8.
Each run appends a line to results/controls/TASK_EPOCHSep.jsonl, a search saves its schedule in results/schedules; the table is
results/controls.md. Seconds are CPU seconds of a process with one thread.
"""
import argparse,gc,sys,time
import torch
from fastai.callback.all import *
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from functools import partial
from common import *
from hba_fastai.all import AutoAugment,HBACallback,PolicyCallback,RandAugment,Schedule,ScheduleCallback,TrivialAugmentWide
from hba_fastai.space import PBASpace

OUT = RESULTS/'controls'
PUBLISHED = HERE.parent/'tests'/'schedules'/'pba'/'rcifar10_16_wrn.txt'
TASKS = {'wrn16': (32, lambda: Bfloat16(wrn(16,1))), 'small': (16, lambda: wrn(10,1))}

# --- controls made of a schedule that HBA found

def shuffled(s, seed):
    "The same policies in a random order"
    i = torch.randperm(len(s), generator=torch.Generator().manual_seed(seed))
    return Schedule(s.progress, s.table[i], s.sigma)

def random_like(s, seed):
    "At each point the same probabilities and the same positions in the ranges, dealt to other operations"
    sp,g = s.space,torch.Generator().manual_seed(seed)
    u,n = (s.table-sp.lo)/(sp.hi-sp.lo),sum(name.endswith('.p') for name in sp.names) # the probabilities come first
    deal = lambda u: torch.stack([r[torch.randperm(len(r), generator=g)] for r in u])
    u = torch.cat([deal(u[:,:n]),deal(u[:,n:])], 1)
    return Schedule(s.progress, sp.lo+(sp.hi-sp.lo)*u, s.sigma)

fixed = lambda: Schedule([0.], PBASpace().values(PBASpace().start().double())[None])

ARMS = { # name: what, Cutout?, search-free policy, with black holes as torchvision's
  'none': ('no augmentation', False, None), 'flip_crop': ('flip + crop', False, None), 'cutout': ('flip + crop + Cutout', True, None),
  'autoaugment': ('+ AutoAugment, CIFAR-10 policy', True, lambda: AutoAugment('cifar10', fill=0.)),
  'rand_1_5': ('+ RandAugment(1, 5)', True, lambda: RandAugment(1, 5, fill=0.)),
  'rand_2_5': ('+ RandAugment(2, 5)', True, lambda: RandAugment(2, 5, fill=0.)),
  'rand_2_9': ('+ RandAugment(2, 9)', True, lambda: RandAugment(2, 9, fill=0.)),
  'trivial': ('+ TrivialAugmentWide', True, lambda: TrivialAugmentWide(fill=0.)), 'pba': ("+ PBA's published schedule", True, None),
  'fixed': ('+ policy fixed at the start of a search', True, None),
  'hba': ('+ HBA, search', True, None), 'replay': ('+ HBA, its schedule replayed', True, None), 'shuffled': ('+ the same schedule in random order', True, None),
  'random': ('+ random schedule of the same strength', True, None),
  'sparing': ('+ HBA with `sparing=True`, search', True, None), 'sparing_replay': ('+ the same, replayed', True, None),
  'letter': ("+ HBA as in the paper, α' = 0.03, search", True, None), 'letter_replay': ("+ the same, replayed", True, None),
  'paper': ("+ HBA in the paper's form, α' = 0.1, search", True, None), 'paper_replay': ("+ the same, replayed", True, None)}

SEARCHES = 'hba','sparing','paper','letter'

def file_of(task, epochs, arm, seed): return RESULTS/'schedules'/f'{task}_{epochs}ep_{arm}_seed{seed}.json'

def check_schedules(task, epochs, arms, seeds, done):
    "End with one sentence where a replay needs the schedule of a search that is done, and it is not there"
    of = {'replay': 'hba', 'shuffled': 'hba', 'random': 'hba', **{f'{a}_replay': a for a in SEARCHES[1:]}}
    for s in seeds:
        for a in (of[a] for a in arms if a in of and (a,s) not in done):
            f = file_of(task, epochs, a, s)
            if (a,s) in done and not f.exists(): sys.exit(f"The search {a} of seed {s} is done and its schedule {f.name} is missing: "
                f"remove its line from {task}_{epochs}ep.jsonl, to search again")

def run(task, arm, seed, epochs, lr=0.05, wd=0.005):
    "One training -> its line in the result file"
    size,net = TASKS[task]
    _,cut,free = ARMS[arm]
    sets = [(x if size==32 else small(x, size),y) for x,y in reduced_cifar(seed)]
    found = lambda a: Schedule.load(file_of(task, epochs, a, seed))
    search = {'hba': lambda: HBACallback(seed=seed), 'sparing': lambda: HBACallback(seed=seed, sparing=True), 'letter': lambda: HBACallback.paper(seed=seed),
              'paper': lambda: HBACallback.paper(seed=seed, hlr=None, floor=0.001)}.get(arm)
    replay = {'fixed': fixed, 'pba': lambda: Schedule.from_pba(PUBLISHED, epochs=200), 'replay': lambda: found('hba'),
              'paper_replay': lambda: found('paper'), 'letter_replay': lambda: found('letter'), 'sparing_replay': lambda: found('sparing'),
              'shuffled': lambda: shuffled(found('hba'), seed), 'random': lambda: random_like(found('hba'), seed)}.get(arm)
    cb = search() if search else ScheduleCallback(replay(), seed=seed) if replay else PolicyCallback(free(), seed=seed) if free else None
    set_seed(seed if search else seed+1000) # a replay starts from other weights than its search; so do the controls
    tfms = [Normalize.from_stats(MEAN, STD), *([FlipCrop(size//8)] if arm!='none' else []), *([CutoutTfm()] if cut else [])]
    learn = Learner(array_dls(*sets, vocab=CLASSES, bs=128, batch_tfms=tfms), net(), opt_func=partial(SGD, mom=0.9, decouple_wd=False), wd=wd)
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    t = time.process_time()
    learn.fit(epochs, lr, cbs=[ParamScheduler({'lr': SchedCos(lr, 0.)}), NoValid(), *([cb] if cb else [])])
    t = time.process_time()-t
    if search:
        file_of(task, epochs, arm, seed).parent.mkdir(parents=True, exist_ok=True)
        cb.schedule.save(file_of(task, epochs, arm, seed))
    return dict(arm=arm, seed=seed, test_error=error_on(learn, learn.dls[2]), valid_error=error_on(learn, learn.dls[1]), cpu_seconds=round(t, 1),
                **({'drawn': 'batch'} if free else {}))

def again(task, epochs, rs) -> list:
    "Commands that run the lines `rs` of a table again, one for each day and version of torch"
    days,unique = {},lambda v: ' '.join(map(str, dict.fromkeys(v)))
    for key,r in rs.items(): days.setdefault(tuple(r['environment'][k] for k in ('date','torch','machine')), []).append(key)
    return [f"`python controls.py --task {task} --epochs {epochs} --seeds {unique(sorted(s for _,s in keys))} --arms {unique(a for a,_ in keys)}`, "
            f"{day}, torch {version}, {machine}, one thread.  " for (day,version,machine),keys in days.items()]

def table():
    "All results as Markdown: mean and standard error over seeds, and the paired difference from the replayed schedule"
    out = []
    for f in sorted(OUT.glob('*.jsonl')):
        rs = {(r['arm'],r['seed']): r for r in map(json.loads, f.read_text().splitlines())}
        task,epochs = f.stem.split('_')
        seeds = sorted({s for _,s in rs})
        out += [f"**{task}**, {epochs.removesuffix('ep')} epochs, seeds {', '.join(map(str, seeds))}", '',
                '| training | test error % | minus that of the replay, paired | CPU s | run on |', '| --- | --- | --- | --- | --- |']
        for arm,(what,_,free) in ARMS.items():
            r = [rs[arm,s] for s in seeds if (arm,s) in rs]
            if not r: continue
            if free and not all('drawn' in o for o in r): what += ' (torchvision, image by image)'
            d = [rs[arm,s]['test_error']-rs['replay',s]['test_error'] for s in seeds if (arm,s) in rs and ('replay',s) in rs]
            pm = lambda v,sign='': f'{{:{sign}.2f}} ± {{:.2f}}'.format(*mean_se(v)) if len(v)>1 else f'{v[0]:{sign}.2f}'
            missing = '' if len(r)==len(seeds) else f' ({len(r)} of {len(seeds)} seeds)'
            difference = pm(d, '+') if d and arm!='replay' else ''
            days = ', '.join(sorted({o['environment']['date'] for o in r}))
            out.append(f"| {what} | {pm([o['test_error'] for o in r])}{missing} | {difference} | {np.mean([o['cpu_seconds'] for o in r]):.0f} | {days} |")
        out += ['', *again(task, epochs.removesuffix('ep'), rs), '']
    return '\n'.join(['The same training for all; mean ± standard error over seeds. Validation images are used by the searches alone.',
        'The defaults are those of the day: "HBA, search" of 40 epochs made a hyper-step every 2 optimizer steps and had no pull; that of 200 epochs, and the',
        'one with `sparing`, made one every 4 and had a pull of 0.4. The paper\'s form has had one every 2, and no pull, throughout.', '', *out])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--task', default='wrn16', choices=list(TASKS))
    ap.add_argument('--epochs', type=int, default=60)
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    ap.add_argument('--arms', nargs='+', default=[a for a in ARMS], choices=list(ARMS))
    ap.add_argument('--worker', default='0/1', help='which seeds: this process / number of processes')
    ap.add_argument('--table', action='store_true', help='only write the table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    k,n = map(int, a.worker.split('/'))
    f = OUT/f'{a.task}_{a.epochs}ep.jsonl'
    f.parent.mkdir(parents=True, exist_ok=True)
    order = sorted(a.arms, key=lambda o: o not in SEARCHES) # searches first, the rest may need their schedules
    done = lambda: {(r['arm'],r['seed']) for r in map(json.loads, f.read_text().splitlines())} if f.exists() else set()
    if not a.table: check_schedules(a.task, a.epochs, order, a.seeds[k::n], done())
    for seed in [] if a.table else a.seeds[k::n]:
        for arm in order:
            if (arm,seed) in done(): continue
            r = run(a.task, arm, seed, a.epochs)
            with f.open('a') as o: o.write(json.dumps({**r, 'environment': environment()})+'\n')
            print(r, flush=True)
            gc.collect() # a Learner is a cycle that holds its images
    OUT.with_suffix('.md').write_text(table())
