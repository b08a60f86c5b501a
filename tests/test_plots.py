"Pictures that people look at: colours, names that can be read, titles that are true, text that is only text, and logs that hold numbers"
import gc,pickle,sys,warnings
from unittest import mock
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from fastai.callback.all import CSVLogger,EarlyStoppingCallback,SaveModelCallback
from fastai.callback.core import Callback
from fastai.data.transforms import Normalize
from conftest import small_learner
from hba_fastai.all import *
from hba_fastai.clock import Worded
from hba_fastai.gallery import augmented
from hba_fastai.ops import OP_NAMES
from hba_fastai.plots import COLOURS,apart,curves
from hba_fastai.policy import Policies

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def moved(space=None, seed=2, at=(0,0.3,0.5,0.7,1), **kw):
    "A schedule in which everything moves"
    space,pct = space or PBASpace(),torch.tensor(at).double()
    away = torch.randn(len(space), generator=torch.Generator().manual_seed(seed))*3
    return Schedule(at, space.values(space.start()+pct[:,None]*away), **kw)

class Noise(Policy):
    space = Space(noise=(0,0.2), grain=(0,1))
    def draw(self, v, generator): return torch.stack([v.noise,v.grain], 1)
    def dose(self, drawn): return drawn
    def apply(self, x, drawn, generator): return x
BOTH = {'PBAPolicy': None, 'Noise': Noise.space}
SCHEDULES = {
    'moved': lambda: moved(provenance=dict(warmup=0.3, joins=True, until=0.7)),
    'another': lambda: moved(seed=5, skip=['Rotate','Invert'], inactive=['Color']),
    'one point': lambda: moved(at=(0,)),
    'stopped early': lambda: moved(at=(0,0.1,0.2), provenance=dict(warmup=0.05, joins=False, until=0.6)),
    'limits': lambda: moved(PBASpace(limits={'Color': (1,1.5)}), limits={'Color': (1,1.5)}),
    'two policies': lambda: moved(PBASpace()+Noise.space, spaces=BOTH),
    'without probabilities': lambda: moved(Noise.space, spaces={'Noise': Noise.space})}

def words_of(ax):
    "[(text, box in pixels)] of all that is written in or beside `ax`"
    ax.figure.draw_without_rendering()
    beside = ax.get_legend().get_texts() if ax.get_legend() else []
    return [(t.get_text(),Text.get_window_extent(t)) for t in [*ax.texts,*beside] if t.get_text()]

@pytest.mark.parametrize('kind', ['bands','lines'])
@pytest.mark.parametrize('what', SCHEDULES)
def test_each_curve_is_named_once_where_it_can_be_read(what, kind):
    schedule = SCHEDULES[what]()
    axs = schedule.plot(kind)
    for ax,of in zip(axs, curves(schedule).values(), strict=True):
        words = words_of(ax)
        assert sorted(w for w,_ in words if w in of)==sorted(of)
        for i,(a,box) in enumerate(words):
            assert ax.figure.bbox.x0<=box.x0 and box.x1<=ax.figure.bbox.x1 and ax.figure.bbox.y0<=box.y0 and box.y1<=ax.figure.bbox.y1, a
            for b,other in words[i+1:]: # half a pixel: boxes are rounded
                assert box.x1<=other.x0+1 or other.x1<=box.x0+1 or box.y1<=other.y0+1.5 or other.y1<=box.y0+1.5, (a,b)

@pytest.mark.parametrize('kind', ['bands','lines'])
def test_an_operation_has_its_colour_in_every_picture(kind):
    def colours(schedule):
        axs = schedule.plot(kind)
        artists = axs[0].collections if kind=='bands' else axs[0].lines
        of = [a.get_facecolor()[0] if kind=='bands' else plt.matplotlib.colors.to_rgba(a.get_color()) for a in artists]
        return {n: plt.matplotlib.colors.to_hex(c) for n,c in zip(curves(schedule)['probability'], of)}
    first,second = (colours(SCHEDULES[k]()) for k in ('moved','another'))
    assert first==COLOURS and second=={o: c for o,c in COLOURS.items() if o not in ('Rotate','Invert','Color')}

def test_colours_differ_from_each_other():
    rgb = np.array([[int(c[i:i+2], 16) for i in (1,3,5)] for c in COLOURS.values()])
    assert sorted(np.abs(rgb[:,None]-rgb).sum(2)[np.triu_indices(15, 1)])[0]>=60 # levels, of 765

def test_bands_add_up_and_names_stand_in_their_own():
    schedule = SCHEDULES['moved']()
    axs = schedule.plot()
    for ax,of in zip(axs, curves(schedule).values()):
        top = np.cumsum(list(of.values()), 0)
        assert np.isclose(ax.get_ylim()[1], top[-1].max())
        for t in ax.texts:
            if t.get_text() not in of: continue
            i,(x,y) = list(of).index(t.get_text()),t.get_position()
            edges = [np.interp(x, schedule.progress.numpy(), o) for o in (top[i]-list(of.values())[i],top[i])]
            assert edges[0]<y<edges[1]

def test_what_is_frozen_is_marked_where_the_search_says_so():
    marks = lambda s: sorted({round(float(l.get_xdata()[0]), 3) for l in s.plot()[0].lines if l.get_linestyle()==':'})
    assert marks(SCHEDULES['moved']())==[0.3,0.7] and marks(SCHEDULES['stopped early']())==[0.05] and marks(SCHEDULES['one point']())==[]

def test_the_identity_of_enhancers_follows_their_limits():
    ax = SCHEDULES['limits']().plot('lines')[1]
    dashed = [l.get_ydata()[0] for l in ax.lines if l.get_color()=='0.45']
    assert np.allclose(sorted(dashed), [0,0.5])

def test_places_are_the_nearest_that_are_apart():
    assert np.allclose(apart([0.2,0.2,0.9], 0.1), [0.15,0.25,0.9]) and np.allclose(np.diff(apart(np.full(5, 0.), 0.5)), 0.25)

def test_html_is_text_that_was_escaped():
    s = moved(provenance={'<script>alert(1)</script>': '<img src=x onerror=alert(2)>', 'model': 'a & b'})
    page = s._repr_html_()
    assert '<script' not in page and '<img src=x' not in page and '&lt;script&gt;' in page and 'a &amp; b' in page and 'base64,' in page
    assert not plt.get_fignums() # nothing is left open, to be shown twice

def test_importing_pictures_imports_neither_fastai_nor_pandas():
    import subprocess
    code = "import hba_fastai.plots,sys; assert not {'fastai','pandas','matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable,'-W','ignore','-c',code]).returncode==0

def test_titles_say_what_was_drawn(monkeypatch):
    drawn,draw = [],PBAPolicy.draw
    monkeypatch.setattr(PBAPolicy, 'draw', lambda self, v, generator=None: drawn.append(draw(self, v, generator)) or drawn[-1])
    learn = small_learner()
    axs = moved().show(learn.dls, pcts=(0,1), n=4)
    assert len(drawn)==2 and axs.shape==(2,4)
    titles = [[ax.get_title().replace('\n', ', ') for ax in row] for row in axs]
    assert titles==[PBAPolicy().describe(d) for d in drawn] and any(map(any, titles))
    for d,row in zip(drawn, titles):
        for title,ops,ms in zip(row, d.op.tolist(), d.m.tolist()):
            said,done = [o.rstrip('°').split() for o in title.split(', ') if o],[(OP_NAMES[o],m) for o,m in zip(ops, ms) if o>=0]
            assert [o[0] for o in said]==[o for o,_ in done]
            for words,(o,m) in zip(said, done): assert abs(float(words[1])-m)<=0.05*abs(m) if TABLE7[o] else len(words)==1

def test_images_are_those_of_the_titles_and_decoded():
    "A sum of policies, behind `Normalize`: the pixels are what the operation gives"
    norm = Normalize.from_stats([0.3]*3, [0.2]*3)
    dls = digits_dls(100, 50, bs=20, size=12, batch_tfms=norm)
    before = [f for f in dls.train.after_batch.fs]
    only = PBAPolicy(skip=[o for o in TABLE7 if o!='Invert'])+Noise()
    lam = only.space.start((0.999,0.3))
    samples = augmented(dls, Policies(only), lam, 0., 8, seed=1)
    plain = augmented(dls, Policies(Noise()), Noise.space.start(), 0., 8, seed=1)
    assert {w for _,w in samples}=={'Invert, Invert, Noise 0.06 0.3','Invert, Noise 0.06 0.3','Noise 0.06 0.3'}
    for ((x,_),words),((same,_),_) in zip(samples, plain):
        assert (x.float() - (255-same.float() if words.count('Invert')==1 else same.float())).abs().max()<=1
    assert [f for f in dls.train.after_batch.fs]==before

def test_pictures_leave_the_random_state_and_the_learner_alone():
    learn = small_learner()
    state = torch.get_rng_state()
    PolicyCallback(TrivialAugmentWide()).show_batch(learn.dls, n=4)
    ScheduleCallback(moved()).show_batch(learn.dls, n=4)
    assert torch.equal(state, torch.get_rng_state()) and [t.order for t in learn.dls.train.after_batch.fs]==[10]

@pytest.mark.parametrize('make', [lambda: PolicyCallback(TrivialAugmentWide()), lambda: ScheduleCallback(moved())])
def test_a_callback_shows_the_images_of_the_learner_that_it_was_in_last(make, tmp_path):
    cb,learn = make(),small_learner()
    small_learner().fit(1, cbs=cb)
    learn.fit(1, cbs=cb)
    state = torch.get_rng_state()
    names = [[ax.get_title() for ax in cb.show_batch(dls, n=4).flat] for dls in (None,learn.dls)]
    assert names[0]==names[1] and torch.equal(state, torch.get_rng_state())
    learn.export(tmp_path/'learn.pkl')
    pickle.loads(pickle.dumps(cb))
    del learn
    gc.collect()
    with pytest.raises(ValueError, match='is in no Learner and was in none'): cb.show_batch()

@pytest.fixture(scope='module')
def searched(tmp_path_factory):
    "A search among callbacks that read the log; and what they wrote"
    path = tmp_path_factory.mktemp('search')
    learn,hba = small_learner(path=path),HBACallback(seed=0, hlr=0.3)
    readers = CSVLogger(),SaveModelCallback('leading', fname='lead'),EarlyStoppingCallback('hyper_loss', patience=4)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '(?s).*monitors') # the images of the hyper-steps
        learn.fit(4, 3e-2, cbs=[hba, *readers])
    return learn,hba,pd.read_csv(path/'history.csv')

def test_leading_survives_all_that_reads_the_log(searched):
    learn,hba,csv = searched
    names,values = learn.recorder.metric_names,np.array(learn.recorder.values)
    column = values[:,names.index('leading')-1]
    assert values.dtype==float and values.shape==(4,len(names)-2) and (np.diff(column)!=0).all()
    assert csv.hyper_loss.dtype==float and csv.hyper_loss.isna().tolist()==[True,False,False,False] # the warm-up
    assert csv.leading[0]=='-' and csv.leading.str.fullmatch(r'-|\w+ 0\.\d\d(; \w+ 0\.\d\d)?').all()
    last = hba.schedule.values(1)
    operation,p = csv.leading.iloc[-1].split('; ')[0].split()
    assert abs(float(p)-(last[f'{operation}_0.p']+last[f'{operation}_1.p'])/2)<=0.005
    assert (learn.path/'models'/'lead.pth').exists()
    learn.recorder.plot_loss()
    assert isinstance(learn.final_record[-1], Worded)
    learn.export('e.pkl')
    assert b'Worded' not in (learn.path/'e.pkl').read_bytes()

def test_signal_and_batch_after_the_fit(searched):
    learn,hba,_ = searched
    axs = hba.plot_signal()
    names = [t.get_text() for t in axs[1].get_yticklabels()][::-1]
    assert names==list(hba.report().index) and [len(o) for o in words_of(axs[0])] and len(hba.show_batch(n=4).flat)==4

@pytest.mark.parametrize('momentum', [0.1,0.01])
def test_a_search_whose_lambda_stands_still_says_so(momentum, capsys):
    learn,hba = small_learner(),HBACallback(seed=0, hlr=1e-6)
    for m in learn.model.modules(): m.momentum = momentum
    learn.fit(12, 1e-2, cbs=hba)
    hba.report()
    said = capsys.readouterr().out
    assert 'Nothing of the policy moved by more than' in said and 'stands out' not in said and ('batch norm has a momentum of 0.01' in said)==(momentum==0.01)

def test_report_by_class_adds_up_to_the_validation_loss(searched, capsys):
    learn,hba,_ = searched
    with learn.no_bar(): loss = learn.validate()[0]
    state = {k: v.clone() for k,v in learn.model.state_dict().items()}
    df = hba.report(by='class')
    assert df.images.sum()==100 and np.isclose((df.end*df.images).sum()/100, loss, rtol=1e-4) and df.change.is_monotonic_decreasing
    assert all(torch.equal(v, state[k]) for k,v in learn.model.state_dict().items()) and 'Loss on the data of the hyper-steps' in capsys.readouterr().out
    with pytest.raises(ValueError, match='fit first'): HBACallback().report(by='class')

class Tracker(Callback):
    order,run = 51,True
    _wandb_step = 7
class TensorBoardCallback(Tracker): pass # by name, as the real ones are found
class WandbCallback(Tracker): pass

def test_trackers_hear_nothing_of_a_validation_within_the_fit():
    class Judge(Callback):
        order = 80
        def after_epoch(self):
            if not self.learn.lock.locked(): self.learn.validate()
    board = TensorBoardCallback()
    board.writer = mock.MagicMock()
    small_learner().fit(2, cbs=[HBACallback(seed=0), board, Judge()])
    assert board.writer.add_figure.call_count==1 and board.writer.add_scalar.call_count==2*27

def test_trackers_get_scalars_and_the_schedule_and_nothing_is_imported_without_them():
    wandb,board = mock.MagicMock(),TensorBoardCallback()
    board.writer = mock.MagicMock()
    learn,hba = small_learner(),HBACallback(seed=0)
    with mock.patch.dict(sys.modules, {'wandb': wandb}): learn.fit(2, cbs=[hba, board, WandbCallback()])
    logged = [c.args[0]['hba/Rotate probability'] for c in wandb.log.call_args_list]
    assert np.allclose(logged, [hba.schedule.values(p)['Rotate_0.p']/2+hba.schedule.values(p)['Rotate_1.p']/2 for p in (0.5,1)])
    assert wandb.run.log_artifact.call_count==1 and board.writer.add_figure.call_count==1
    names = [c.args[0] for c in board.writer.add_scalar.call_args_list]
    assert len(names)==2*27 and 'hba/Rotate magnitude' in names and not any(type(cb).__name__=='TrackSearch' for cb in learn.cbs)
