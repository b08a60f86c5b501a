"""Hyper-steps that cost less: does the search find the same? Plants as in planted.py, and cost as in surcharge.py.

    python benchmarks/cheap_steps.py --task digits --seeds 0 1 2 # runs what is missing
    python benchmarks/cheap_steps.py --cost                      # writes results/cheap_steps/cost.json
    python benchmarks/cheap_steps.py --table                     # writes results/cheap_steps.md

The arms differ in hyper-steps alone: training steps between them, steps of λ in each, images. While λ is frozen they are the same fit, so
the process forks where the rest ends, and each arm goes on from there as a fit of its own would. λ is not pulled to its start, so that
what is compared is what the hypergradients say. Each arm appends one line to
results/cheap_steps/TASK.jsonl. The place and the lead of the planted operation are by dose (see planted.py); the lead is
log2(its dose ÷ the largest other dose).
"""
import argparse,json,math,os,sys,time,traceback
import torch
from fastai.callback.all import *
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from functools import partial
from common import *
from planted import CLASSES,TASKS,doses,rank,shifted
from surcharge import learner
from hba_fastai.clock import default_hlr,steps_per_epoch
from hba_fastai.replay import ScheduleCallback
from hba_fastai.schedule import Schedule
from hba_fastai.search import HBACallback
from hba_fastai.space import PBASpace
from hba_fastai.target import target_batches

OUT,KEPT = RESULTS/'cheap_steps',('digits','long') # tasks of planted.py with one operation
ARMS = { # training steps between hyper-steps, steps of λ in each, images as a share of a training batch
    'T2': dict(T_train=2, moves=1, share=1.),
    'S4B4': dict(T_train=4, moves=2, share=0.25),
    'S4B2': dict(T_train=4, moves=2, share=0.5),
    'S4': dict(T_train=4, moves=2, share=1.)}

# --- one fit until λ moves, then one for each arm

class Forking(HBACallback):
    "A search that becomes all of `arms`, one after the other, where λ begins to move; `arm` is what this process has become"
    def __init__(self, arms, **kwargs):
        super().__init__(**kwargs)
        self.arms,self.arm,self.steps = arms,None,0

    def after_step(self):
        super().after_step()
        self.steps += 1

    def after_batch(self):
        if self.arm is None and self.learn.pct_train*self.learn.n_epoch >= self.clock.wait-1e-9: self.fork()
        super().after_batch()

    def fork(self):
        self.until_here = time.process_time()
        for arm in self.arms:
            if in_child(): return self.become(arm)
        os._exit(0)

    def become(self, arm):
        "Be at this step what a search with the arguments of `arm` would be"
        vars(self).update(ARMS[arm], arm=arm)
        self.clock.T_train,self.clock.count = self.T_train,(self.steps-1)%self.T_train+1
        self.rate = default_hlr(steps_per_epoch(self.learn)*(self.course.total-self.clock.wait)/self.T_train*self.moves)
        self.stream.close()
        self.stream = self.undo.enter_context(target_batches(self.learn, self.valid, self.base_seed, share=self.share))

def in_child():
    "Fork: True in the new process; here False, when that has ended"
    sys.stdout.flush()
    pid = os.fork()
    if pid and os.waitpid(pid, 0)[1]: sys.exit('An arm failed')
    return not pid

def search(task, shift, seed, hba):
    "A fit with `hba` whose target and test images are shifted -> the Learner, training images"
    sets,net,bs,epochs,lr,wd,_,pad = TASKS[task]
    a,b,c = sets(seed)
    b,c = ((shifted(x, shift, seed+k), y) for k,(x,y) in ((1,b),(2,c)))
    set_seed(seed)
    tfms = [Normalize.from_stats(MEAN, STD), FlipCrop(pad, flip=task!='digits')]
    learn = Learner(array_dls(a, b, c, vocab=CLASSES, bs=bs, batch_tfms=tfms), net(), opt_func=partial(SGD, mom=0.9, decouple_wd=False), wd=wd)
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    learn.fit(epochs, lr, cbs=[ParamScheduler({'lr': SchedCos(lr, 0.)}), NoValid(), hba])
    return learn,a[0]

def write_line(task, shift, seed, hba):
    "Search as `hba` and write what this process was"
    learn,x = search(task, shift, seed, hba)
    seconds = [round(t, 2) for t in (hba.until_here,time.process_time())]
    pixel,hard = doses(x[:256].float()/255, hba.lam.value.double())
    r = dict(arm=hba.arm, shift=shift, seed=seed, pixel=pixel, severity=hard, lam=[round(o, 3) for o in hba.lam.value.tolist()],
             test_error=error_on(learn, learn.dls[2]), hyper_steps=len(hba.lam.series), rate=hba.rate, cpu_seconds=seconds)
    with (OUT/f'{task}.jsonl').open('a') as o: o.write(json.dumps({**r, 'environment': environment()})+'\n')
    print(task, hba.arm, shift, seed, 'place', rank(r)+1, f'lead {lead(r):.2f}', f"{r['test_error']:.1f}%", seconds, flush=True)

def run(task, arms, shift, seed):
    "The arms that are missing, from one warm-up"
    done = {(r['arm'],r['shift'],r['seed']) for r in read(task)}
    arms = [a for a in arms if (a,shift,seed) not in done]
    if not arms or not in_child(): return
    try: write_line(task, shift, seed, Forking(arms, seed=seed, pull=0.))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def read(task):
    f = OUT/f'{task}.jsonl'
    return [json.loads(l) for l in f.read_text().splitlines()] if f.exists() else []

def lead(r):
    "Of the planted dose over the largest other, in bits"
    other = max(v for o,v in r['pixel'].items() if o!=r['shift'])
    return math.log2(max(r['pixel'][r['shift']], 1e-5)/max(other, 1e-5))

# --- what a training step costs

class Timed(HBACallback):
    "A search that notes the CPU seconds of its hyper-steps"
    took = ()
    def hyper_step(self):
        t = time.process_time()
        super().hyper_step()
        self.took = [*self.took, time.process_time()-t]

class Stopwatch(Callback):
    "CPU seconds at the end of each batch, hyper-steps included"
    order = 1000
    def before_train(self): self.at = []
    def after_batch(self): self.at.append(time.process_time())

SKIP,STEPS = 4,16 # steps before the clock starts, and on the clock

def per_step(learn, cb=None):
    "CPU seconds of a training step, and of the hyper-steps divided among the training steps"
    watch = Stopwatch()
    learn.fit(1, 1e-3, cbs=[NoValid(), watch, *([cb] if cb else [])])
    hyper = sum(cb.took[SKIP//cb.T_train:]) if isinstance(cb, Timed) else 0.
    return (watch.at[-1]-watch.at[SKIP-1]-hyper)/STEPS,hyper/STEPS

def cost(model, rounds):
    """Times ÷ that of a plain training step: kinds take turns within one process, and each stands between two plain fits, so that a drift
    of the machine cancels. The hyper-steps of a fit are compared with the training steps between them, and those, in which the response
    is learned, with plain ones"""
    learn = learner(model, SKIP+STEPS, 'cpu')
    start = Schedule([0.], PBASpace().values(PBASpace().start((0.05,0.3)))[None])
    kinds = {'plain again': lambda: None, 'replay': lambda: ScheduleCallback(start, seed=0),
             **{arm: partial(Timed, seed=0, warmup=0., **kw) for arm,kw in ARMS.items()}}
    steps,hyper,(before,_) = {k: [] for k in kinds},{a: [] for a in ARMS},per_step(learn)
    for _ in range(rounds):
        for k,cb in kinds.items():
            (step,h),(after,_) = per_step(learn, cb()),per_step(learn)
            steps[k].append(round(2*step/(before+after), 4))
            if k in ARMS: hyper[k].append(round(h/step, 4))
            before = after
            print(k, steps[k][-1], round(h/step, 4), f'{after:.3f} s a plain step', flush=True)
    return dict(model=model, rounds=rounds, steps=steps, hyper=hyper, environment=environment())

def phases(c):
    "Time of a training step ÷ a plain one: under a policy alone, while the response is learned, and with the hyper-steps of each arm"
    response = float(np.median(sum((c['steps'][a] for a in ARMS), [])))
    return dict(policy=float(np.median(c['steps']['replay'])), response=response, **{a: response*(1+float(np.median(c['hyper'][a]))) for a in ARMS})

def whole(of, arm, until=1.):
    "Time of a fit ÷ a plain one: λ is frozen to 30%, hyper-steps until `until`, then the policy alone; `of`: see `phases`"
    return 0.3*of['response'] + (until-0.3)*of[arm] + (1-until)*of['policy']

# --- the table

def difference(v):
    "Mean ± standard error of paired differences"
    return '{:+.2f} ± {:.2f}'.format(*mean_se(v))

def effect_row(arm, runs):
    "Cells of one arm, beside T2 in the same searches"
    rs,old = ({(r['shift'],r['seed']): r for r in runs if r['arm']==a} for a in (arm,'T2'))
    k = [rank(r)+1 for r in rs.values()]
    shifts = dict.fromkeys(s for s,_ in rs)
    places = ' '.join(f"{s}:{','.join(str(rank(r)+1) for (o,_),r in rs.items() if o==s)}" for s in shifts)
    pairs = [(rs[i],old[i]) for i in rs if i in old]
    against = ['',''] if arm=='T2' else [difference([f(a)-f(b) for a,b in pairs]) for f in (lead,lambda r: r['test_error'])]
    means = f"{np.mean([lead(r) for r in rs.values()]):.2f}",f"{np.mean([r['test_error'] for r in rs.values()]):.1f}"
    T,moves,share = ARMS[arm].values()
    return [arm,T,moves,f'{share:g}',len(k),sum(p==1 for p in k),sum(p<=3 for p in k),places,means[0],against[0],means[1],against[1]]

EFFECT = ['arm','training steps between','steps of λ','batch','runs','first','first three','places, per shift',
          'lead, bits','against T2','test error %','against T2']
COST = ['arm','hyper-step ÷ training step','step with hyper-steps','fit','fit, λ frozen from 60%']

def table():
    "All results as Markdown"
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    head = lambda cells: [line(cells),line(['---']*len(cells))]
    out = []
    for task in KEPT:
        if runs := read(task):
            out += [f'**{task}**: the planted operation (see `planted.py`); differences are paired, mean ± standard error.', '', *head(EFFECT)]
            out += [line(effect_row(a, runs)) for a in ARMS if any(r['arm']==a for r in runs)]
            e = runs[-1]['environment']
            out += ['', f"`{e['command']}` and the like, {e['date']}, torch {e['torch']}, {e['machine']}, one thread per run.", '']
    f = OUT/'cost.json'
    if not f.exists(): return '\n'.join(out)
    c = json.loads(f.read_text())
    of = phases(c)
    again,response = c['steps']['plain again'],sum((c['steps'][a] for a in ARMS), [])
    own = {a: float(np.median(c['hyper'][a]))*ARMS[a]['T_train'] for a in ARMS}
    out += [f"**Cost** ({c['model']}: images of 32 pixels, batches of 128), time ÷ that of a plain fit: a training step under a policy alone "
            f"{of['policy']:.2f}, while the response is learned {of['response']:.2f} (the median of {len(response)} fits, {min(response):.2f} to "
            f"{max(response):.2f}; plain against plain {min(again):.2f} to {max(again):.2f}: that is the noise). "
            "Fits by these parts: response to 30%, then hyper-steps to the end, or to 60% and the policy alone behind.", '', *head(COST)]
    out += [line([a, f'{own[a]:.2f}', f'{of[a]:.2f}', f'{whole(of, a):.2f}', f'{whole(of, a, 0.6):.2f}']) for a in ARMS]
    return '\n'.join([*out, '', footer(c['environment']), ''])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--task', default='digits', choices=KEPT)
    ap.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS))
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    ap.add_argument('--shifts', nargs='+')
    ap.add_argument('--cost', action='store_true', help='measure the cost of a training step instead')
    ap.add_argument('--rounds', type=int, default=3)
    ap.add_argument('--table', action='store_true', help='only write the table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    if a.cost: save_json(OUT/'cost.json', cost('resnet18-32', a.rounds))
    for seed in [] if a.cost or a.table else a.seeds:
        for shift in a.shifts or TASKS[a.task][6]: run(a.task, a.arms, shift, seed)
    OUT.with_suffix('.md').write_text(table())
