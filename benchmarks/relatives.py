"""HBA's relatives on small ground: a synthetic problem with a known optimum, Algorithm 2 against one network on digits, and the paper's Table 6 in small

    python benchmarks/relatives.py branin --seeds 20   # runs what is missing, then writes results/relatives.md
    python benchmarks/relatives.py digits --seeds 0 1 2
    python benchmarks/relatives.py table6 --seeds 0 1 2
    python benchmarks/relatives.py table

**Branin.** The papers name no synthetic function, so this one is ours. Hyperparameters λ (2,), unbounded; positions u = sigmoid(λ); they mean a point
x(λ) = (15·u₁-5, 15·u₂) of Branin's domain. *Weights* θ (2,). The training loss of θ under λ is ½|θ-x(λ)|², so the best response is θ*(λ) = x(λ). The
validation loss is Branin(θ), which has three minima of 0.397887. A training step is SGD at a rate of 0.1. λ starts at N(0, 1.5²), θ at x(λ) + N(0,
1).

A network that *responds* is θ̂(λ') = θ + R(λ'-λ), R (2,2) from 0: its training step takes the mean over 8 ε ~ N(0, 1) of ½|θ̂(λ+ε)-x(λ+ε)|², its
hyper-step (every 4 steps, behind the first 10%) is Adam at 0.1 along Rᵀ∇Branin(θ), and θ moves by R·Δλ with λ, as in the package. Selections are
every 10 steps, and by the validation loss. Each way has 2,000 passes: a forward pass is 1, a backward pass is 1; a training step and a hyper-step are
2, a comparison of n members is n, what one member tells a teacher is 2. n = 10; truncation 20%.

* random search: 20 λ, trained for 50 steps each
* PBT: factors 0.8 or 1.2 on positions
* PB2: the same, with the values of copies from Ray Tune's PB2 in the place of factors (needs the extra `ray`)
* Algorithm 2: σ = 1, σ' = 0.01 of the rms of θ
* hypergradient: one network with all of the passes; GB-HPO + RS: 10 of them, no copies
* HPM, its forms, and its ablations: as in `hba_fastai.hpm`.

**Digits.** 500 training images, 500 of validation, the others test, batches of 50, flips and crops none, `digits_net`, one cycle at 1e-2, under the
default policy. HBA: one fit of 30 epochs. Algorithm 2 (`Population`): n = 4 and 8 at the same number of forward and backward passes of images, all
told, and n = 4 at the same number of epochs. What each found is replayed with a new network for 30 epochs.

**Table 6 in small.** STN's AlexNet at a quarter of its width and STN's 15 regularisers, on CIFAR-10 as JPEG: 2,000 training images, 1,000 of
validation, 2,000 test images, batches of 64, no flips and crops, SGD of momentum 0.9 without weight decay, at a constant rate (the best of `RATES` in
20 epochs under the start of the space, with seed 100; `rates` runs that). All are judged at their last epoch, and have as many passes as four
trainings of 20 epochs: an image that goes through a network is 1, its gradient is 1, in training, in hyper-steps, where members are compared and for
the teacher (not in the validation behind each epoch, which all have and only `judged` uses: 500 images). So one network trains the longer.
A pass of STN, HBA and HPM takes more time than others: the layers that respond do their work twice.

* random search: four λ ~ N(start, 1), which are the starts of PBT and HPM too; the best on the validation sample counts
* PBT: factors 0.8 or 1.2 on positions, every 2 epochs the worst of four becomes the best
* STN: `HBACallback.stn`; HBA: the defaults of this package, in convolutions as in the paper's Table 6
* HPM: four such searches, every 2 epochs the worst becomes the best and changes as the teacher says, or by one more gradient step

results/relatives.jsonl: problem, way, seed, and loss, passes (Branin); error, replayed, passes, seconds (digits); losses, errors in percent, epochs,
passes, seconds of the processor (Table 6).
"""
import argparse,json,math,time
from functools import partial
import numpy as np, torch
from common import CLASSES,RESULTS,cifar,environment,made_by,mean_se
from hba_fastai.lam import adam,adam_start
from hba_fastai.teacher import Lessons,Teacher,mutate,told

FILE,BEST,BUDGET,N,EVERY,T = RESULTS/'relatives.jsonl',0.397887,2000,10,10,4

def place(lam): return 15*lam.sigmoid()-torch.tensor([5.,0.])
def branin(t):
    x,y = t.unbind(-1)
    return (y-5.1/(4*math.pi**2)*x*x+5/math.pi*x-6)**2 + 10*(1-1/(8*math.pi))*x.cos()+10

class Members:
    "n members side by side"
    def __init__(self, n, seed):
        self.n,self.g,self.passes = n,torch.Generator().manual_seed(seed),0
        self.lam = 1.5*self.randn(n,2)
        self.theta,self.R = place(self.lam)+self.randn(n,2),torch.zeros(n,2,2)
        self.adam = [adam_start(l) for l in self.lam]

    def randn(self, *size): return torch.randn(size, generator=self.g)
    def losses(self):
        self.passes += self.n
        return branin(self.theta)

    def step(self, responds):
        self.passes += 2*self.n
        eps = self.randn(8,self.n,2) if responds else torch.zeros(1,self.n,2)
        d = self.theta + torch.einsum('nij,bnj->bni', self.R, eps) - place(self.lam+eps)
        self.theta,self.R = self.theta-0.1*d.mean(0),self.R-0.1*torch.einsum('bni,bnj->nij', d, eps)/len(eps)

    def response(self, i): return lambda l: branin(self.theta[i]+self.R[i]@(l-self.lam[i]))

    def move(self, i, new):
        new = new.clamp(-7, 7)
        self.theta[i] += self.R[i]@(new-self.lam[i])
        self.lam[i] = new

    def hyper_step(self, i):
        self.passes += 2
        l = self.lam[i].clone().requires_grad_()
        g, = torch.autograd.grad(self.response(i)(l), l)
        new,self.adam[i],_ = adam(self.lam[i], g, self.adam[i], 0.1)
        self.move(i, new)

    def copy(self, i, k):
        for o in (self.lam,self.theta,self.R): o[i] = o[k]
        self.adam[i] = self.adam[k]

def searched(seed, n=N, share=0.2, mutation='teacher', hyper=True, of='position', bound=1., m=8, form='softmax', lr=0.05):
    "Networks that respond: HPM, its ablations, hypergradient"
    p,lessons,on = Members(n, seed),Lessons(Teacher(2, m, form, seed), lr),torch.ones(2, dtype=torch.bool)
    step,k,size,factors = 0,round(share*n),[],[]
    while p.passes<BUDGET:
        p.step(True)
        step += 1
        moves = p.passes>0.1*BUDGET
        if hyper and moves and step%T==0:
            for i in range(n): p.hyper_step(i)
        if not (k and moves and step%EVERY==0): continue
        order = p.losses().argsort().tolist()
        if mutation=='teacher':
            lessons.learn([told(lessons.teacher, p.response(i), p.lam[i].clone(), on, 1., of, bound) for i in range(n)])
            p.passes += 2*n
        for i in order[n-k:]:
            p.copy(i, order[int(torch.randint(k, (1,), generator=p.g))])
            if mutation=='gradient': p.hyper_step(i)
            elif mutation=='teacher':
                with torch.no_grad(): new,g = mutate(lessons.teacher, p.lam[i].clone(), on, 1., of, bound)
                factors.append((p.passes/BUDGET,(g-1).abs().mean().item()))
                p.move(i, new)
    early,late = ([v for t,v in factors if (t<0.4)==first] for first in (True,False))
    more = dict(early=np.mean(early), late=np.mean(late)) if early and late else {}
    return dict(loss=p.losses().min().item(), passes=p.passes, **more)

def population(seed, kind):
    p,step = Members(N, seed),0
    while p.passes<BUDGET:
        p.step(False)
        step += 1
        if step%EVERY: continue
        order = p.losses().argsort().tolist()
        for i in range(N) if kind=='best' else order[-2:]: p.copy(i, order[0] if kind=='best' else order[int(torch.randint(2, (1,), generator=p.g))])
        if kind=='best':
            p.lam += p.randn(N,2)
            p.theta += 0.01*p.theta.square().mean(1, keepdim=True).sqrt()*p.randn(N,2)
        else:
            for i in order[-2:]: p.lam[i] = (p.lam[i].sigmoid()*torch.tensor([0.8,1.2])[torch.randint(2, (2,), generator=p.g)]).clamp(1e-3, 1-1e-3).logit()
    return dict(loss=p.losses().min().item(), passes=p.passes)

def pb2(seed):
    "Ray's choice of what a copy goes on with: where a Gaussian process of gain by position and time has its upper bound"
    import pandas as pd
    from ray.tune.schedulers.pb2 import _explore
    np.random.seed(seed) # which Ray draws from
    p,step,data,bounds = Members(N, seed),0,pd.DataFrame(),{'u1': (1e-3,1-1e-3), 'u2': (1e-3,1-1e-3)}
    u = p.lam.sigmoid().clamp(1e-3, 1-1e-3).double()
    while p.passes<BUDGET:
        p.step(False)
        step += 1
        if step%EVERY: continue
        losses,current = p.losses(),None
        order = losses.argsort().tolist()
        rows = [dict(Trial=str(i), Time=step, u1=u[i,0].item(), u2=u[i,1].item(), Reward=-losses[i].item()) for i in range(N)]
        data = pd.concat([data,pd.DataFrame(rows)]).reset_index(drop=True)
        for i in order[-2:]:
            k = order[int(torch.randint(2, (1,), generator=p.g))]
            new,data = _explore(data, bounds, current, str(k), str(i), dict(u1=u[k,0].item(), u2=u[k,1].item()))
            p.copy(i, k)
            u[i] = torch.tensor([new['u1'],new['u2']])
            current = np.array([u[i].tolist()]) if current is None else np.concatenate([current,[u[i].tolist()]])
            p.lam[i] = u[i].clamp(1e-3, 1-1e-3).logit().float()
    return dict(loss=p.losses().min().item(), passes=p.passes)

def random_search(seed):
    p = Members(20, seed)
    for _ in range(50): p.step(False)
    return dict(loss=p.losses().min().item(), passes=p.passes)

WAYS = {'random search': random_search, 'PBT': lambda s: population(s, 'pbt'), 'PB2': pb2, 'Algorithm 2': lambda s: population(s, 'best'),
        'hypergradient': lambda s: searched(s, n=1, share=0), 'GB-HPO + RS': lambda s: searched(s, share=0),
        '**HPM**': searched, 'HPM without learned mutation': lambda s: searched(s, mutation='gradient'),
        'HPM that only copies': lambda s: searched(s, mutation='none'),
        'HPM without hyper-training': lambda s: searched(s, hyper=False)}
FORMS = {'of logits': dict(of='logit'), 'LeakyReLU': dict(form='leaky_relu'), 'LeakyReLU of logits': dict(of='logit', form='leaky_relu'),
         'm=2': dict(m=2), 'm=32': dict(m=32), 'rate 0.01': dict(lr=0.01), 'rate 0.2': dict(lr=0.2), 'rate 1': dict(lr=1.),
         'bound 0.3': dict(bound=0.3), 'bound 3': dict(bound=3.)}
WAYS.update({f'HPM, {name}': (lambda s, kw=kw: searched(s, **kw)) for name,kw in FORMS.items()})

def lines(): return [json.loads(l) for l in FILE.read_text().splitlines()] if FILE.exists() else []
def runs(problem): return {(r['way'],r['seed']): r for r in lines() if r.get('problem')==problem}
def add(**r):
    with FILE.open('a') as f: f.write(json.dumps(r)+'\n')

def head(*cols): return [f"| {' | '.join(cols)} |", '| --- '*len(cols)+'|']
def pm(v, digits=2): return '{:.{d}f} ± {:.{d}f}'.format(*mean_se(v), d=digits) if len(v)>1 else f'{v[0]:.{digits}f}'

def branin_table():
    rs = runs('branin')
    out = ['## Branin','','Validation loss of the winner above the optimum, 2,000 passes each: median, mean ± standard error over seeds, and in how many it is '
           'below 0.1; |g-1| of the copies in the first 40% of the passes and later.','', *head('way','median','mean','below 0.1','early','late')]
    for way in WAYS:
        r = [v for (w,_),v in rs.items() if w==way]
        if not r: continue
        e,of = [v['loss']-BEST for v in r],lambda k: f"{np.mean([v[k] for v in r if k in v]):.2f}" if any(k in v for v in r) else ''
        out.append(f"| {way} | {np.median(e):.3f} | {pm(e)} | {sum(v<0.1 for v in e)} of {len(e)} | {of('early')} | {of('late')} |")
    return out+['']

DIGITS = {'HBA, one network': (None,None), 'Algorithm 2, n = 4, equal passes': (4,True), 'Algorithm 2, n = 8, equal passes': (8,True),
          'Algorithm 2, n = 4, as many epochs': (4,False)}

def digits(way, seed, epochs=30):
    from fastai.vision.all import Learner,error_rate,set_seed
    from hba_fastai.all import HBACallback,Population,ScheduleCallback,digits_dls
    from hba_fastai.session import digits_net
    (n,equal),t = DIGITS[way],time.process_time()
    new = lambda: Learner(digits_dls(500, 500, seed=seed, device='cpu'), digits_net(), metrics=error_rate)
    def fitted(learn, *cbs):
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2, cbs=cbs)
        return learn
    set_seed(seed)
    hyper_steps = epochs*10*0.7/4 # behind the warm-up, one in four steps
    passes = 2*50*(10*epochs+hyper_steps) # forward and backward, of training and hyper-steps
    if n is None:
        learn = fitted(new(), hba:=HBACallback(seed=seed))
        schedule = hba.schedule
    else:
        pop = Population(new, n, seed=seed)
        pop.logger = lambda line: None
        per_epoch = n*(2*500+pop.judge)
        pop.fit_one_cycle(round(passes/per_epoch) if equal else epochs, 1e-2)
        learn,schedule,passes = pop.best,pop.schedule,int(pop.frame().groupby('member')[['forward','backward']].max().sum().sum())
    seconds = round(time.process_time()-t, 1)
    set_seed(1000+seed)
    of = lambda l: 100*float(l.validate(ds_idx=2)[1])
    with learn.no_bar(): own = of(learn)
    again = fitted(new(), ScheduleCallback(schedule, seed=seed))
    with again.no_bar(): return dict(error=own, replayed=of(again), passes=passes, seconds=seconds)

def digits_table():
    rs = runs('digits')
    if not rs: return []
    out = ['## Digits','','Error in percent on unseen digits: mean ± standard error over seeds.','',
           *head('search','its own network','its schedule, replayed','passes of images','CPU s','seeds')]
    for way in DIGITS:
        r = [v for (w,_),v in rs.items() if w==way]
        of = lambda k: [v[k] for v in r]
        if r: out.append(f"| {way} | {pm(of('error'))} | {pm(of('replayed'))} | {np.mean(of('passes')):,.0f} | {np.mean(of('seconds')):.0f} | {len(r)} |")
    return out+['']

RATE,RATES,EPOCHS,STEP = 0.03,(0.01,0.03,0.1),20,2 # the rate of all; what it was chosen from; of random search; between comparisons
TABLE6 = {'random search': EPOCHS, 'PBT': 19, 'STN': 55, 'HBA': 69, 'HPM': 16, 'HPM without learned mutation': 16} # epochs, at about equal passes
PUBLISHED = {'grid search': ('0.794','0.809',''), 'random search': ('0.921','0.752',''), 'PBT': ('','','21.9'),
             'STN': ('0.579 ± 0.005','0.582 ± 0.004','19.86 ± 0.21'),
             'HBA': ('0.548 ± 0.005','0.556 ± 0.005','18.76 ± 0.11'), 'HPM': ('0.564','0.565','18.9'), 'HPM without learned mutation': ('0.614','0.627','')}

def alexnet(seed):
    from fastai.vision.all import CrossEntropyLossFlat,Normalize,error_rate
    from hba_fastai.all import STN_STATS,array_dls,stn_learner
    g,d = torch.Generator().manual_seed(seed),cifar()
    i,j = torch.randperm(50_000, generator=g)[:3000],torch.randperm(10_000, generator=g)[:2000]
    (x,y),(xt,yt) = d['train'],d['test']
    sets = (x[i[:2000]],y[i[:2000]]),(x[i[2000:]],y[i[2000:]]),(xt[j],yt[j])
    dls = array_dls(*sets, vocab=CLASSES, bs=64, batch_tfms=[Normalize.from_stats(*STN_STATS)], device='cpu')
    return stn_learner(dls, 0.25, loss_func=CrossEntropyLossFlat(), metrics=error_rate)

def alone(seed, epochs, cb, rate=RATE):
    "One network; afterwards (learner, passes)"
    from fastai.vision.all import set_seed
    set_seed(seed)
    learn = alexnet(seed)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, rate, cbs=cb)
    steps = epochs*len(learn.dls.train) + len(cb.lam.gradients() if hasattr(cb, 'lam') else [])
    return learn,2*64*steps

def population_of(kind, seed, epochs, every=STEP, **kwargs):
    "Four networks; afterwards (the best, passes)"
    from hba_fastai.all import stn_policy
    pop = kind(lambda: alexnet(seed), 4, every, judge=500, seed=seed, policy=stn_policy(), **kwargs)
    pop.logger = lambda line: None
    pop.fit(epochs, RATE)
    return pop.best,int(pop.frame().groupby('member')[['forward','backward']].max().sum().sum())

def table6(way, seed, epochs=None):
    from hba_fastai.all import HBACallback,HPM,PBT,stn_policy
    epochs,t,form = epochs or TABLE6[way],time.process_time(),dict(strategy='conv')
    if way=='STN': learn,passes = alone(seed, epochs, HBACallback.stn(epochs, seed=seed))
    elif way=='HBA': learn,passes = alone(seed, epochs, HBACallback(policy=stn_policy(), seed=seed, **form))
    elif way=='random search': learn,passes = population_of(PBT, seed, epochs, every=epochs, share=0)
    elif way=='PBT': learn,passes = population_of(PBT, seed, epochs)
    else: learn,passes = population_of(HPM, seed, epochs, mutation='teacher' if way=='HPM' else 'gradient', **form)
    return dict(**judged(learn), epochs=epochs, passes=passes, seconds=round(time.process_time()-t, 1))

def judged(learn):
    with learn.no_bar(): (vl,ve),(tl,te) = learn.validate(ds_idx=1),learn.validate(ds_idx=2)
    return dict(valid_loss=vl, valid_error=100*ve, test_loss=tl, test_error=100*te)

def rate(way, seed):
    from hba_fastai.all import PolicyCallback,stn_policy
    return judged(alone(seed, EPOCHS, PolicyCallback(stn_policy(), seed=seed), float(way))[0])

def table6_table():
    rs,rates = runs('table6'),runs('rates')
    if not rs: return []
    out = ['## Table 6 in small','','A quarter of the width, 2,000 training images, about 320,000 passes each, so that one network has 55 to 69 epochs where '
           'a member of four has 16 to 20: mean ± standard error over seeds.','',
           *head('way','epochs','valid loss','test loss','valid error %','test error %','passes of images','CPU s','seeds')]
    for way in TABLE6:
        r = [v for (w,_),v in rs.items() if w==way]
        of = lambda k: [v[k] for v in r]
        figures = [pm(of(k), d) for k,d in (('valid_loss',3),('test_loss',3),('valid_error',2),('test_error',2)) if r]
        if r: out.append(f"| {way} | {r[0]['epochs']} | {' | '.join(figures)} "
            f"| {np.mean(of('passes')):,.0f} | {np.mean(of('seconds')):.0f} | {len(r)} |")
    out += ['','As published, for the whole AlexNet and 40,000 training images, where nothing is said of passes: grid search, random search, '
            'STN and HBA in Table 6 of HBA; PBT and HPM in the rebuttal of HPM (errors are 100 less the accuracy).','',
            *head('published','valid loss','test loss','test error %'), *[f"| {way} | {' | '.join(v)} |" for way,v in PUBLISHED.items()],'']
    if rates: out += ['The rate, by the validation loss with seed 100: ' + ', '.join(f"{v['valid_loss']:.3f} at {w}" for (w,_),v in rates.items())+'.','']
    return out

def table():
    env = [l['environment'] for l in lines() if 'environment' in l]
    out = ["What the problems are: the head of `benchmarks/relatives.py`.",'',*branin_table(),*digits_table(),*table6_table(),*made_by(env)]
    FILE.with_suffix('.md').write_text('\n'.join(out))

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('problem', choices=['branin','digits','table6','rates','table'])
    ap.add_argument('--seeds', type=int, nargs='+', default=[20], help='of branin: how many; of others: which')
    a = ap.parse_args()
    torch.set_num_threads(1)
    if a.problem!='table': add(environment=environment())
    ways,f = dict(digits=(DIGITS,digits), table6=(TABLE6,table6), rates=(map(str, RATES),rate)).get(a.problem, ((),None))
    if a.problem=='branin': todo = [(w,s,WAYS[w]) for s in range(a.seeds[0]) for w in WAYS]
    else: todo = [(w,s,partial(f, w)) for s in a.seeds for w in ways]
    for way,seed,f in todo:
        if (way,seed) in runs(a.problem): continue
        add(problem=a.problem, way=way, seed=seed, **f(seed))
        table()
    table()
