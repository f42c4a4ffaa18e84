"""What each rank does in the tests of DeepSpeed's ZeRO."""

import os

# Read by DeepSpeed when it is imported.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("LOCAL_RANK", "0")

import deepspeed
import torch
import torch.distributed as dist

import pera_kernels as pk
from pera_kernels import parallel
from pera_kernels.testing import judge
from tests import parallel_cases as cases
from tests import sharded_cases

# Of parameters: those up to this many elements stay gathered. The second is DeepSpeed's default.
ALL_PARTITIONED, ALL_GATHERED = 0, 100_000
RATE, STEPS = 1e-2, 3


def settings(stage=3, threshold=ALL_PARTITIONED):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": threshold,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }


def start():
    """DeepSpeed on the processes' group that there is."""
    # Or it compiles an operator of its own.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def optimizer_of(net):
    # Rounding of gradients that are next to zero must not decide on steps.
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], RATE, eps=1e-3)


def engine_of(net, stage=3, threshold=ALL_PARTITIONED):
    start()
    config = settings(stage, threshold)
    return deepspeed.initialize(model=net, optimizer=optimizer_of(net), config=config)[0]


def whole(tensor):
    return pk.sharded.whole(tensor).detach()


def trained_values(net):
    return {n: whole(p) for n, p in cases.trained_parameters(net).items()}


def step(engine):
    """The loss on the whole batch, before a step on it."""
    loss = cases.loss_of(engine, cases.own_rows(cases.batch()).clone().requires_grad_())
    engine.backward(loss)
    engine.step()
    total = loss.detach().double()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def alone(dtype, backend):
    """Losses and parameters of one process that steps on the whole batch."""
    net = cases.model(dtype=dtype)
    for layer in pk.adapted_modules(net).values():
        layer.backend = backend
    optimizer = optimizer_of(net)
    found = {}
    for number in range(STEPS):
        loss = cases.loss_of(net, cases.batch(dtype))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found[f"loss {number}"] = loss.detach()
    return found | trained_values(net)


def compare(found):
    """The project's numeric rule: one process in the same dtype is the measure."""
    truth = alone(torch.float64, "reference")
    reference = alone(torch.float32, "reference")
    assert set(found) == set(truth)
    for name, got in found.items():
        got = got.to(torch.float32)
        verdict = judge(name, got, reference[name], truth[name], torch.float32)
        assert verdict.passed, verdict


def is_gathered(net):
    """Whether every parameter is whole on this rank; none may be or all."""
    (answer,) = {p.numel() > 0 for p in net.parameters()}
    return answer


def partitioned_model():
    """As :func:`cases.model`, of parameters that are partitioned from their making on."""
    start()
    source = cases.model()
    with deepspeed.zero.Init(config_dict_or_path=settings()):
        net = cases.Model()
    pk.inject(net, cases.TARGETS, 3, modules_to_save=["head"])
    for module, other in zip(net.modules(), source.modules(), strict=True):
        for part in [part for part, p in other._parameters.items() if p is not None]:
            pk.sharded.write(module, part, getattr(other, part).detach())
    return net


def training(stage, threshold, before):
    """Steps on every rank's part of the batch are those of one process on the whole."""
    engine = engine_of(partitioned_model() if before else cases.model(), stage, threshold)
    found = {f"loss {number}": step(engine) for number in range(STEPS)}
    assert is_gathered(engine) == (stage < 3 or threshold == ALL_GATHERED)
    compare(found | trained_values(engine))


def gathered(tensor):
    """A parameter as DeepSpeed itself gathers it for a reader."""
    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


class Pair:
    """An engine, and a whole model that steps as it does."""

    def __init__(self, stage, threshold):
        self.engine, self.same = engine_of(cases.model(), stage, threshold), cases.model()
        self.optimizer = optimizer_of(self.same)
        self.gathers = stage < 3 or threshold == ALL_GATHERED

    def train(self):
        """Steps of both are alike; then the whole model takes the engine's values."""
        for _ in range(2):
            loss = cases.loss_of(self.same, cases.batch())
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            torch.testing.assert_close(step(self.engine), loss.detach().double())
        assert is_gathered(self.engine) == self.gathers
        found, own = trained_values(self.engine), cases.trained_parameters(self.same)
        assert list(found) == list(own)
        with torch.no_grad():
            for name, parameter in own.items():
                torch.testing.assert_close(found[name], parameter.detach(), msg=name)
                parameter.copy_(found[name])

    def layers(self):
        layers, others = map(pk.adapted_modules, (self.engine, self.same))
        return zip(layers.values(), others.values(), strict=True)

    @torch.no_grad()
    def check_outputs(self):
        for _ in range(2):
            torch.testing.assert_close(self.engine(cases.batch()), self.same(cases.batch()))


def calls(stage, threshold, inner, folder):
    """Save, load, merge, export and the rest under ZeRO are those of a whole model."""
    pair = Pair(stage, threshold)
    net, same = pair.engine.module if inner else pair.engine, pair.same
    pair.train()
    parallel.check(net)
    found, expected = pk.adapter_state_dict(net), pk.adapter_state_dict(same)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])
    for layer, other in pair.layers():
        assert layer.quadratic_share() == other.quadratic_share()
        with torch.no_grad():
            assert torch.equal(layer.delta_weight(), other.delta_weight())
        if stage == 3:
            cases.refused(RuntimeError, "no_grad", layer.delta_weight)
    pk.save_adapter(net, f"{folder}/saved")
    pk.export_lora(net, f"{folder}/lora", quiet=True)
    if dist.get_rank() == 0:
        pk.save_adapter(same, f"{folder}/same")
        pk.export_lora(same, f"{folder}/same_lora", quiet=True)
        sharded_cases.assert_same_files(f"{folder}/saved", f"{folder}/same")
        sharded_cases.assert_same_files(f"{folder}/lora", f"{folder}/same_lora")
    dist.barrier()
    assert is_gathered(net) == pair.gathers
    merges(pair, net, keep_base=True)
    merges(pair, net, keep_base=False)
    # What is loaded is what the optimizer steps from.
    other = cases.model(seed=2)
    pk.save_adapter(other, f"{folder}/{dist.get_rank()}")
    for model in (net, same):
        pk.load_adapter(model, f"{folder}/{dist.get_rank()}", overwrite=True)
    for name, tensor in pk.adapter_state_dict(net).items():
        assert torch.equal(tensor, pk.adapter_state_dict(other)[name])
    pair.check_outputs()
    pair.train()
    pk.unload(net)
    pk.unload(same)
    kinds = [type(m) for m in pair.engine.module.modules()]
    assert kinds == [type(m) for m in same.modules()]
    named = zip(pair.engine.module.named_parameters(), same.named_parameters(), strict=True)
    for (name, parameter), (other_name, other) in named:
        assert name == other_name
        assert torch.equal(gathered(parameter), other), name
    pair.check_outputs()
    pair.train()
    pair.check_outputs()
    for module in pair.engine.module.modules() if stage == 3 else ():
        # DeepSpeed fetches in the backward for what took the layers' places.
        held = [cell.cell_contents for cell in module.pre_bwd_fn.setup_context.__closure__]
        assert module in [m for m in held if isinstance(m, torch.nn.Module)]


def merges(pair, net, keep_base):
    for _ in range(2):
        before = [gathered(layer.weight) for layer, _ in pair.layers()]
        pair.train()
        pk.merge(net, keep_base=keep_base)
        pk.merge(pair.same, keep_base=keep_base)
        for layer, other in pair.layers():
            assert layer.merged and other.merged
            assert torch.equal(gathered(layer.weight), other.weight)
        pk.adapter_state_dict(net)
        pair.check_outputs()
        pk.unmerge(net)
        pk.unmerge(pair.same)
        for (layer, other), base in zip(pair.layers(), before, strict=True):
            assert not layer.merged and layer.merged_base is None
            assert torch.equal(gathered(layer.weight), base if keep_base else other.weight)
        pair.check_outputs()


def without_engine(folder):
    """Calls on a model of which DeepSpeed partitioned the parameters and no more."""
    start()
    same, x = cases.model(), cases.batch()
    pk.save_adapter(same, f"{folder}/{dist.get_rank()}")
    for with_adapters in (False, True):
        net = partitioned_model()
        if not with_adapters:
            pk.unload(net)
        pk.load_adapter(net, f"{folder}/{dist.get_rank()}", overwrite=True)
        for name, tensor in pk.adapter_state_dict(net).items():
            assert torch.equal(tensor, pk.adapter_state_dict(same)[name])
        assert torch.equal(gathered(net.head.weight), same.head.weight)
    pk.unload(net)
    expected = same(x)
    pk.unload(same)
    for one, other in zip(net.parameters(), same.parameters(), strict=True):
        assert torch.equal(gathered(one), other)
    engine = deepspeed.initialize(model=net, config=settings())[0]
    with torch.no_grad():
        torch.testing.assert_close(engine(x), expected)


def one_rank_alone(threshold, folder):
    """A call that one rank makes alone ends, and nothing is changed or left over."""
    pair = Pair(3, threshold)
    pair.train()
    before = pk.adapter_state_dict(pair.engine)
    with sharded_cases.little_patience():
        for name, call in sharded_cases.CALLS.items():
            if dist.get_rank() == 0:
                cases.refused(
                    TimeoutError,
                    f"{name}.*rank 1 of 2 did not",
                    lambda c=call: c(pair.engine, folder),
                )
            dist.barrier()
    for name, tensor in pk.adapter_state_dict(pair.engine).items():
        assert torch.equal(tensor, before[name])
    merges(pair, pair.engine, keep_base=True)


def refusals(stage):
    """What cannot be right is refused before anything changes."""
    for net in (engine_of(cases.model(), stage), engine_of(cases.Model(), stage)):
        for outer in (net, net.module):
            cases.refused(
                ValueError, "before it is wrapped", lambda o=outer: pk.inject(o, ["o_proj"])
            )
    if stage < 3:
        return
    pair = Pair(stage, ALL_PARTITIONED)
    pk.merge(pair.engine)
    cases.refused(RuntimeError, "unmerge before", pair.engine.module.state_dict)
    layer = next(iter(pk.adapted_modules(pair.engine).values()))
    with torch.no_grad(), layer.disabled():
        cases.refused(RuntimeError, "unmerge before", lambda: pair.engine(cases.batch()))
    cases.refused(RuntimeError, "empty_partition_cache", lambda: pk.unmerge(pair.engine))
    cases.refused(RuntimeError, "empty_partition_cache", layer.unmerge)
    pair.engine.empty_partition_cache()
    pk.unmerge(pair.engine)
    merges(pair, pair.engine, keep_base=True)
    # What is not finite is refused on all ranks, and the layers before it are unmerged.
    last = pair.engine.module.blocks[1].down_proj
    pk.sharded.write(last, "pera_B", torch.full((8, 3), 1e30))
    pk.sharded.write(last, "pera_A", torch.full((3, 12), 1e30))
    before = [gathered(layer.weight) for layer, _ in pair.layers()]
    for call in (pk.merge, pk.unload):
        cases.refused(ValueError, "infinite or NaN", lambda c=call: c(pair.engine))
    for (layer, _), weight in zip(pair.layers(), before, strict=True):
        assert not layer.merged
        assert torch.equal(gathered(layer.weight), weight)


def reset(stage, threshold):
    """An adapter that is initialised anew steps from there."""
    pair = Pair(stage, threshold)
    pair.train()
    for layer, other in pair.layers():
        for one in (layer, other):
            torch.manual_seed(3)
            one.reset_adapter()
        assert torch.equal(gathered(layer.pera_A) if stage == 3 else layer.pera_A, other.pera_A)
    pair.train()
    pair.check_outputs()


def saved_whole(threshold, folder):
    """DeepSpeed saves a model that was unloaded."""
    pair = Pair(3, threshold)
    pair.train()
    pk.unload(pair.engine)
    pk.unload(pair.same)
    assert pair.engine.save_16bit_model(folder)
    if dist.get_rank() == 0:
        found = torch.load(f"{folder}/pytorch_model.bin")
        expected = pair.same.state_dict()
        assert list(found) == list(expected)
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name])
    dist.barrier()


def half_precision(folder):
    """Adapters in float32 over a base in bfloat16 are gathered and stepped in float32."""
    start()

    def adapted(dtype):
        torch.manual_seed(1)
        net = cases.Model().to(torch.bfloat16).to(dtype)
        return pk.inject(net, cases.TARGETS, 3)

    engine, same = engine_of(adapted(torch.bfloat16)), adapted(torch.bfloat16)
    optimizer = optimizer_of(same)
    x = cases.batch(torch.bfloat16)
    for _ in range(2):
        loss = cases.loss_of(engine, cases.own_rows(x).clone().requires_grad_())
        engine.backward(loss)
        engine.step()
        cases.loss_of(same, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    pk.save_adapter(engine, folder)
    pk.load_adapter(same, folder, overwrite=True)
    found = pk.adapter_state_dict(engine)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(pk.adapter_state_dict(same)[n], t) for n, t in found.items())
    pk.unload(engine)
    pk.unload(same)
    for one, other in zip(engine.parameters(), same.parameters(), strict=True):
        assert torch.equal(gathered(one), other)


def under_peft(threshold, folder):
    """PEFT's ``save_pretrained`` writes what is whole, or says what to give it."""
    import peft

    from pera_kernels.peft import PeraConfig

    start()
    torch.manual_seed(1)
    config = PeraConfig(r=3, target_modules=cases.TARGETS, modules_to_save=["head"])
    engine = engine_of(peft.get_peft_model(cases.Model(), config), threshold=threshold)
    step(engine)
    net, first = engine.module, dist.get_rank() == 0
    whole_state = engine._zero3_consolidated_16bit_state_dict()
    if threshold == ALL_PARTITIONED:
        cases.refused(
            ValueError, "get_state_dict", lambda: net.save_pretrained(f"{folder}/{dist.get_rank()}")
        )
    else:
        assert is_gathered(net)
        net.save_pretrained(f"{folder}/gathered", is_main_process=first)
    if first:
        net.save_pretrained(f"{folder}/saved", state_dict=whole_state)
    pk.export_lora(engine, f"{folder}/lora", quiet=True)
    dist.barrier()
    torch.manual_seed(1)
    other = peft.PeftModel.from_pretrained(cases.Model(), f"{folder}/saved")
    own = dict(other.named_parameters())
    for name, parameter in net.named_parameters():
        assert torch.equal(gathered(parameter), own[name]), name
    cases.refused(TypeError, "ZeRO-3", net.merge_adapter)
