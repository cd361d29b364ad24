"""Results of invented runs, for tests of reports."""

from curlora.continual.results import Guarded, MethodResult, RunResults, Score, SeedResult, TaskInfo, TextScore

TEXT = "a text"


def make_results(seeds=(0,), **changes):
    """A run of three tasks by three methods; later seeds score a little higher."""
    methods = [
        make_method("frozen", "Frozen <heads>", [[0.74], [0.74, 0.77], [0.74, 0.77, 0.89]], [20.2] * 4, 0, 0, seeds),
        make_method(
            "lora",
            "LoRA",
            [[0.825], [0.815, 0.79], [0.79, 0.805, 0.88]],
            [20.2, 20.6, 21.3, 21.4],
            1_290_240,
            5_180_000,
            seeds,
        ),
        make_method(
            "curlora",
            "CURLoRA",
            [[0.77], [0.77, 0.8], [0.76, 0.79, 0.89]],
            [20.2, 20.4, 20.5, 20.6],
            23_040,
            140_900,
            seeds,
        ),
    ]
    fields = dict(
        title="Three tasks, one after another",
        created="2026-01-01 00:00",
        base_model="SmolLM2-135M-Instruct",
        base_parameters=134_515_008,
        heldout={TEXT: f"{TEXT} (2,048 tokens, windows of 512, stride 512)"},
        protocol={},
        settings={"epochs": 1, "batch_size": 8},
        recipe=None,
        environment={"torch": "2", "device": "CPU (x86_64)"},
        tasks=[make_task(name) for name in ("reviews", "reuters", "tweets")],
        methods=methods,
    )
    return RunResults(**{**fields, **changes})


def make_results_by_loss(**changes):
    """A run of two chat tasks without generated answers: their exact match is always 0."""
    losses = {
        "frozen": [[2.0], [2.0, 1.5]],
        "lora": [[1.4], [1.7, 0.9]],
        "curlora": [[1.5], [1.55, 1.0]],
    }
    tasks = [make_task(name, kind="chat", metric="exact match", majority_rate=0.01) for name in ("sums", "dialogues")]
    methods = []
    for method, rows in losses.items():
        made = make_method(method, method.upper(), [[0.0], [0.0, 0.0]], [20.2, 20.6, 21.3])
        scores = [[Score(accuracy=0.0, loss=loss) for loss in row] for row in rows]
        methods.append(made.model_copy(update={"seeds": [made.seeds[0].model_copy(update={"scores": scores})]}))
    return make_results(tasks=tasks, methods=methods, **changes)


def make_task(name, **changes):
    fields = dict(
        name=name,
        kind="classification",
        metric="accuracy",
        description=f"about {name}",
        labels=["a", "b"],
        train_examples=400,
        evaluation_examples=200,
        majority_rate=0.5,
    )
    return TaskInfo(**{**fields, **changes})


def make_method(name, label, accuracy, perplexity, trained=0, size=0, seeds=(0,), **changes):
    """A method; its seed number ``n`` has every accuracy ``0.01 n`` and every later perplexity ``0.1 n`` higher."""
    fields = dict(
        name=name,
        label=label,
        method=name,
        options={"r": 16} if trained else {},
        plugins=[],
        learning_rate=1e-3 if trained else 0.0,
        trainable_parameters=trained,
        adapter_bytes=size,
        seeds=[make_seed(seed, accuracy, perplexity, n) for n, seed in enumerate(seeds)],
    )
    return MethodResult(**{**fields, **changes})


def make_seed(seed, accuracy, perplexity, number=0, **changes):
    before, *later = perplexity
    after = [TextScore(perplexity=p + 0.1 * number, drift=abs(p - before) / 50) for p in later]
    fields = dict(
        seed=seed,
        scores=[[Score(accuracy=a + 0.01 * number, loss=1 - a) for a in row] for row in accuracy],
        before=[],
        base=[],
        heldout={TEXT: [TextScore(perplexity=before, drift=0.0), *after]},
        losses=[(5, 1.2 + 0.1 * number), (10, 0.8), (15, 0.5)],
        steps=15,
        train_tokens=10_000,
        train_seconds=30.0,
        seconds=40.0,
    )
    return SeedResult(**{**fields, **changes})


def with_guard(results):
    """Return a run whose last method has a guard that scaled the second task's change back to a half."""
    *others, method = results.methods
    records = [
        Guarded(predicted=0.005, perplexity_rise=0.006, limit=0.01, scale=1.0),
        Guarded(predicted=0.0098, perplexity_rise=0.0099, limit=0.01, scale=0.5),
        Guarded(predicted=0.0099, perplexity_rise=0.01, limit=0.01, scale=1.0),
    ]
    seeds = [seed.model_copy(update={"guarded": records}) for seed in method.seeds]
    return results.model_copy(update={"methods": [*others, method.model_copy(update={"seeds": seeds})]})
