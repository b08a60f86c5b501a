"What a search says beforehand: the figures that the fit then has, and a Learner that is as before"
import random
import numpy as np
import pytest
import torch
from fastai.callback.training import GradientAccumulation
from conftest import small_learner
from hba_fastai.all import HBACallback,TABLE7
from hba_fastai.plan import n_hyper_steps

def state(learn):
    "All that a look beforehand could have changed"
    numbers = random.random(),np.random.rand(),torch.rand(1).item()
    modules = [(n,type(m),m.training,len(m._forward_pre_hooks)) for n,m in learn.model.named_modules()]
    return numbers,modules,[len(dl.after_batch.fs) for dl in learn.dls.loaders],len(learn.cbs),{k: v.clone() for k,v in learn.model.state_dict().items()}

@pytest.mark.parametrize('kw', [dict(), dict(T_train=2, T_val=2), dict(warmup=0), dict(valid=0.5)])
def test_the_fit_is_as_planned(kw):
    learn,hba = small_learner(),HBACallback(seed=0, **kw)
    p = hba.plan(learn, 3)
    with learn.no_bar(): learn.fit(3, 1e-3, cbs=hba)
    assert len(hba.lam.series)==p['hyper_steps'] and hba.rate==p['hlr']
    assert hba.schedule.provenance['why']==p['responds']

def test_what_a_plan_needs_and_says(capsys):
    learn = small_learner()
    with pytest.raises(TypeError, match='plan was given a DataLoaders'): HBACallback().plan(learn.dls, 3)
    HBACallback(sparing=True).plan(learn, 3)
    assert 'Acts:        as far as the loss' in capsys.readouterr().out

def test_with_a_target_and_fine_tune(capsys):
    learn = small_learner()
    hba = HBACallback(target=learn.dls.valid, seed=0)
    p = hba.plan(learn, 6)
    assert 'take 50% of each batch from epoch 3.6' in capsys.readouterr().out
    with learn.no_bar(): learn.fine_tune(5, 1e-3, cbs=hba)
    assert len(hba.lam.series)==p['hyper_steps'] and sum(p['classes'].values())==100

def test_nothing_of_the_learner_changes():
    learn = small_learner(seed=1)
    HBACallback(target=learn.dls.valid).plan(learn, 9)
    one,two = state(learn),state(small_learner(seed=1))
    assert one[:4]==two[:4] and all(torch.equal(v, two[4][k]) for k,v in one[4].items())

def test_it_refuses_what_the_fit_would():
    learn = small_learner()
    for epochs in (0,2.5,'x'):
        with pytest.raises(ValueError, match='must be a whole number of 1 or more'): HBACallback().plan(learn, epochs)
    with pytest.raises(ValueError, match="strategy 'first_lstm' is unknown"): HBACallback(strategy='first_lstm').plan(learn, 3)

def test_a_search_too_short_is_told(capsys):
    learn = small_learner()
    assert n_hyper_steps(HBACallback(), 10)==2
    HBACallback().plan(learn, 1)
    assert '2 hyper-steps cannot make an operation stand out' in capsys.readouterr().out

def test_few_operations_have_no_crowd_to_stand_out_from(capsys):
    "Without a crowd the spread is that of the largest null, 6, and a signal is at most the root of the number of hyper-steps: 18² = 324"
    HBACallback(skip=[o for o in TABLE7 if o not in ('Rotate','Invert')], T_val=2).plan(small_learner(), 40)
    said = capsys.readouterr().out
    assert '142 hyper-steps, 2 every 4 optimizer steps' in said and 'cannot make an operation stand out where so few are searched (2)' in said
    HBACallback().plan(small_learner(), 40)
    assert 'cannot make' not in capsys.readouterr().out

def test_gradient_accumulation_and_the_best_of_a_population(capsys):
    "Hyper-steps count optimizer steps, of which there are fewer; what takes the best has no rate"
    learn,hba = small_learner(cbs=GradientAccumulation(50)),HBACallback(exploit='best', seed=0) # a step every third batch
    p = hba.plan(learn, 6)
    said = capsys.readouterr().out
    assert 'one every 4 optimizer steps' in said and 'each to the best of 3 policies' in said and 'rate' not in said and "exploit='best' has none" in said
    with learn.no_bar(), learn.no_logging(): learn.fit(6, 1e-3, cbs=hba)
    assert hba.clock.n_steps(10/3, 6)==pytest.approx(p['hyper_steps'], abs=1) and p['batches']==60

def test_what_was_planned_is_not_said_again(capsys):
    learn,hba = small_learner(),HBACallback(seed=0)
    learn.logger = print
    hba.plan(learn, 1)
    capsys.readouterr()
    learn.fit(1, 1e-3, cbs=hba)
    assert 'responds in' not in capsys.readouterr().out
    learn.fit(1, 1e-3, cbs=HBACallback(seed=0))
    assert 'responds in' in capsys.readouterr().out
