"Hypergradients that are not finite, λ at the end of its range, hold-outs, and memory over a long fit"
import gc,math
import pytest, torch
from fastai.callback.all import (ChannelsLast,EarlyStoppingCallback,GradientAccumulation,GradientClip,ReduceLROnPlateau,SaveModelCallback,
                                 TerminateOnNaNCallback)
from fastai.callback.core import Callback
from conftest import small_learner
from hba_fastai.data import array_dls,digits
from hba_fastai.lam import LAM_MAX,adam,adam_start
from hba_fastai.search import HBACallback

class Bad(HBACallback):
    "Every `every`-th hyper-validation batch holds an infinite pixel"
    name = 'hba'
    every,made = 0,0
    def hyper_step(self):
        n = self.made = self.made+1
        stream,bad = self.stream,self.every and n%self.every==0
        class One:
            def __next__(s):
                b = next(stream)
                return (b[0]*float('inf'),*b[1:]) if bad else b
        self.stream = One()
        before = (self.lam.value.clone(),[a.clone() for a in self.lam.adam],{k:v.clone() for k,v in self.model.state_dict().items()})
        try: super().hyper_step()
        finally: self.stream = stream
        same_search = torch.equal(before[0], self.lam.value) and all(torch.equal(a,b) for a,b in zip(before[1], self.lam.adam))
        same = same_search and all(torch.equal(v, before[2][k]) for k,v in self.model.state_dict().items())
        assert same==bool(bad)

def test_bad_hypergradients_are_skipped_and_counted():
    learn,hba = small_learner(n_train=400),Bad(warmup=0, T_train=2) # 20 steps, 10 hyper-steps per epoch
    hba.every,rows = 5,[]
    learn.logger = lambda r: rows.append(list(r))
    learn.fit(2, cbs=hba)
    assert [r[learn.recorder.metric_names.index('skipped')] for r in rows]==[2,2] and hba.lam.value.isfinite().all() and hba.schedule.table.isfinite().all()
    assert all(math.isfinite(r[learn.recorder.metric_names.index('hyper_loss')]) for r in rows)

def test_too_many_bad_hypergradients_stop_the_search_with_the_reason():
    learn,hba = small_learner(n_train=400),Bad(warmup=0, T_train=2)
    hba.every = 3
    with pytest.raises(FloatingPointError, match='3 of 10 hypergradients of this epoch were not finite'): learn.fit(2, cbs=hba)
    assert len(learn.hba_schedule)>=1 and all('forward' not in vars(m) for m in learn.model.modules())
    learn.fit(1)

def test_steps_that_overflow_in_half_precision_do_not_count():
    "A gradient scaler that starts far too high cancels the first weight steps; hyper-steps come after real ones only"
    from fastai.callback.all import MixedPrecision
    class AMP(MixedPrecision):
        "The real autocast and scaler, on the CPU"
        name,real = 'mixed_precision',0
        def before_fit(self):
            self.autocast,self.learn.scaler,self.scales = torch.amp.autocast('cpu', dtype=torch.float16),torch.amp.GradScaler('cpu', init_scale=2.**40),[]
        def before_step(self): super().before_step(); self.real += 1 # not reached by a step that is cancelled
    class Count(HBACallback):
        name,made = 'hba',0
        def hyper_step(self): self.made += 1; super().hyper_step()
    learn,hba,amp = small_learner(n_train=600),Count(),AMP()
    learn.fit(2, cbs=[hba, amp])
    assert 0 < amp.real < learn.train_iter==60 and hba.made==amp.real//hba.T_train and hba.schedule.table.isfinite().all()

def test_lambda_saturates():
    class Push(HBACallback):
        name = 'hba'
        def before_batch(self): super().before_batch(); self.rate = 5.
    hba = Push(pull=0., T_train=2)
    small_learner().fit(4, cbs=hba)
    assert hba.lam.value.abs().max()==LAM_MAX and hba.schedule.table.isfinite().all()
    lam,state = torch.full((3,), LAM_MAX),adam_start(torch.zeros(3))
    for _ in range(500): lam = adam(lam, torch.tensor([-1.,0,1]), state, 0.1)[0].clamp(-LAM_MAX, LAM_MAX)
    assert lam[0]==LAM_MAX and lam[2]==-LAM_MAX # and it can come back

@pytest.mark.parametrize('share', [0.1,0.5])
def test_held_out_items_are_not_trained_on_and_stratified(share):
    x,y = digits(12)
    x = x.clone(); x[:200,:,0,0] = torch.arange(200, dtype=torch.uint8)[:,None] # an item is known by its first pixel
    dls = array_dls((x[:200],y[:200]), (x[200:300],y[200:300]), vocab=range(10), bs=10)
    learn,seen = small_learner(dls=dls),{'train': set(), 'hyper': set()}
    class See(HBACallback):
        name = 'hba'
        def hyper_step(self):
            stream = self.stream
            class Spy:
                def __next__(s): b = next(stream); seen['hyper'] |= set((b[0][:,0,0,0]*255).round().int().tolist()); return b
            self.stream = Spy()
            super().hyper_step(); self.stream = stream
        def attach(self):
            super().attach()
            self.ids = dls.train.get_idxs()
    hba = See(valid=share, T_train=1)
    learn.fit(4, cbs=hba)
    kept = set(hba.ids)
    assert len(kept)+round(200*share)==pytest.approx(200, abs=5) and not kept & seen['hyper'] and seen['hyper'] <= set(range(200))-kept
    out = sorted(set(range(200))-kept)
    for c in range(10): assert abs(sum(y[i]==c for i in out)-share*sum(y[:200]==c)) < 1
    assert sorted(dls.train.get_idxs())==list(range(200)) and len(dls.train)==20 and 'get_idxs' not in vars(dls.train)
    assert hba.schedule.provenance['valid_items']==len(out) and hba.schedule.provenance['train_items']==len(kept)

@pytest.mark.filterwarnings('ignore:The hold-out has no image of')
def test_hold_outs_that_do_not_fit():
    for v in (0,1,1.5,-0.1):
        with pytest.raises(ValueError, match='a share between 0 and 1|is a share of the training set'): HBACallback(valid=v)
    learn = small_learner(n_train=20)
    with pytest.raises(ValueError, match='valid=10 leaves 10 training items, less than one batch of 20'): learn.fit(1, cbs=HBACallback(valid=10))
    learn.fit(1)
    class Own(type(learn.dls.train)):
        def get_idxs(self): return list(range(self.n))
    learn.dls.loaders[0].__class__ = Own
    with pytest.raises(ValueError, match='Own chooses its items itself'): learn.fit(1, cbs=HBACallback(valid=0.5))

def test_non_native_half_precision_is_refused():
    "fastai lets it run on a GPU only, so the check itself is called"
    learn = small_learner()
    learn.add_cb(type('NonNative', (__import__('fastai.callback.fp16', fromlist=['x']).NonNativeMixedPrecision,), {})())
    hba = HBACallback()
    learn.add_cb(hba)
    with pytest.raises(ValueError, match='Non-native half precision'): hba.refuse()

def rss():
    with open('/proc/self/statm') as f: return int(f.read().split()[1])*4096

@pytest.mark.slow
def test_soak_two_thousand_batches_with_every_companion(tmp_path):
    "Memory is flat: after 500 of 2,000 batches, the peak grows by less than 2%"
    if not __import__('os').path.exists('/proc/self/statm'): pytest.skip('resident memory is read from /proc')
    learn = small_learner(n_train=1000, n_valid=100, path=tmp_path) # 50 batches per epoch
    peaks = []
    class Watch(Callback):
        order = 90
        def after_epoch(self): gc.collect(); peaks.append(max(rss(), peaks[-1] if peaks else 0))
    cbs = [HBACallback(condition='dose', checkpoint='soak', valid=0.1), ChannelsLast(), GradientClip(1.),
           GradientAccumulation(20), SaveModelCallback(with_opt=True), ReduceLROnPlateau(patience=50),
           EarlyStoppingCallback(patience=99), TerminateOnNaNCallback(), Watch()]
    learn.fit_one_cycle(45, 1e-2, cbs=cbs)
    assert learn.train_iter>=2000 and len(peaks)==45
    assert peaks[-1] < 1.02*peaks[11], f'{peaks[11]/2**20:.1f} MiB after 12 epochs, {peaks[-1]/2**20:.1f} MiB after 45'
