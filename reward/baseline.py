"""What words alone say of a pair or a row: TF-IDF and logistic regression, to compare models with.

scikit-learn is imported here and in ``reward.classes`` where it is used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Better and worse response.
TextPair = tuple[str, str]

NEEDS = "scikit-learn>=1.9,<1.10"


def bag_of_words_labels(
    train: Sequence[str], labels: Sequence[int], heldout: Sequence[str]
) -> Tensor:
    """Return the class of every held-out text by the words of the training texts alone.

    TF-IDF and multinomial logistic regression; ``[M]`` long.

    Args:
        train, labels: at least two classes.

    Raises:
        ImportError: scikit-learn is missing or broken.
    """
    from sklearn.linear_model import LogisticRegression

    words = _words()
    model = LogisticRegression(max_iter=1000).fit(words.fit_transform(train), labels)
    return torch.from_numpy(model.predict(words.transform(heldout)))


def bag_of_words_outcomes(train: Sequence[TextPair], heldout: Sequence[TextPair]) -> Tensor:
    """Say which held-out pairs a linear model on the responses' words orders as the labels do.

    Each response is the TF-IDF vector of its words and punctuation marks; a logistic regression
    without intercept learns from the differences of the training pairs, in both directions.

    Args:
        train, heldout: at least one pair each.

    Returns:
        ``[M]`` float32: 1 right, 0 wrong, 0.5 where the model cannot tell.

    Raises:
        ImportError: scikit-learn is missing or broken.
    """
    import scipy.sparse
    from sklearn.linear_model import LogisticRegression

    words = _words()
    words.fit([text for pair in train for text in pair])

    def differences(pairs: Sequence[TextPair]) -> scipy.sparse.csr_matrix:
        better, worse = zip(*pairs, strict=True)
        return words.transform(better) - words.transform(worse)

    learned = differences(train)
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    wins = [1] * len(train) + [0] * len(train)
    model.fit(scipy.sparse.vstack([learned, -learned]), wins)
    order = torch.sign(torch.from_numpy(model.decision_function(differences(heldout))))
    return ((order + 1) / 2).float()


def _words() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", sublinear_tf=True)
