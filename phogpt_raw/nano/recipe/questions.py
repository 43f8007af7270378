"""Pages of questions and answers, mined from the articles' own sentences.

They teach a small base what a question is, and to begin an answer with what was asked about. The
surprise is the page: six to ten unrelated questions and answers are one document, and only its end
is an end. After one answer the base goes on to the next question; to stop there is what fine-tuning
has to teach it.
"""

import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest

from phogpt_raw.nano.recipe.phrases import NOT_A_CLAUSE, UNTURNED, is_clause, is_noun_phrase, words

TEMPLATES = {  # VinAI's two prompts, and what stands between two questions of a page
    "4B-Chat": ("### Câu hỏi: {q}\n### Trả lời: {a}", "\n"),
    "7B5-Instruct": ("### Câu hỏi:\n{q}\n\n### Trả lời:{a}", "\n\n"),
}

SENTENCE_END = re.compile(
    r"(?<=[\w)”\"%][a-zà-ỹ0-9)”\"%][.!?])(?<!\b[SDMJ][trs]\.)\s+(?=[A-ZÀ-ỸĐ\"“0-9])"
)
CONNECTIVE = re.compile(
    r"^(?:Tuy nhiên|Ngoài ra|Do đó|Do vậy|Vì vậy|Vì thế|Bên cạnh đó|Mặt khác|Đồng thời|Hiện nay"
    r"|Hiện tại|Hiện|Ngày nay|Thông thường|Nói chung|Nhìn chung|Đặc biệt|Trên thực tế|Thực tế"
    r"|Theo đó|Trong đó|Cuối cùng|Ban đầu|Sau đó|Trước đó|Từ đó|Ngược lại|Nhưng|Và|Cũng theo đó"
    r"|Mặc dù vậy|Tuy vậy|Về sau|Khi đó|Lúc này|Bởi vậy|Như vậy|Chính vì vậy|Thêm vào đó"
    r"|Hơn nữa),? (?=\w)"
)


def sentences(text: str) -> Iterator[str]:
    """Sentences of 8 to 40 words ending in a full stop.

    Taken out: remarks in parentheses, and words that only tie a sentence to the one before.
    """
    text = re.sub(r"\s*\([^()\n]*\)", "", text)
    for whole in chain.from_iterable(SENTENCE_END.split(line) for line in text.split("\n")):
        sentence = CONNECTIVE.sub("", whole)
        if sentence != whole:
            sentence = sentence[0].upper() + sentence[1:]
        sentence = re.sub(r";.*", ".", sentence)
        if (
            8 <= len(sentence.split()) <= 40
            and sentence.endswith(".")
            and not re.search(r"[()\[\]{}=*…:\"“”‘?!]|\.[. ]|\b(dạ|ạ)\b", sentence, re.I)
        ):
            yield sentence


@dataclass(frozen=True)
class Question:
    """`phrase` is what is asked about; the answer says it near its beginning."""

    kind: str
    phrase: str
    question: str
    answer: str


ABOUT = [
    "{X} là gì?", "Thế nào là {x}?", "Bạn biết gì về {x}?",
    "Hãy giới thiệu về {x}.", "Hãy giới thiệu ngắn gọn về {x}.", "Kể cho tôi nghe về {x}.",
    "Cho tôi hỏi về {x}.", "Cho tôi biết về {x}.", "Tôi muốn biết về {x}.", "{X} có đặc điểm gì?",
    "Giải thích cho tôi {x} là gì.", "Bạn có thể nói về {x} không?", "Hãy cho biết {x} là gì.",
]  # fmt: skip
WHO = [
    "{X} là ai?", "Bạn biết {x} là ai không?", "Hãy giới thiệu về {x}.",
    "Hãy giới thiệu ngắn gọn về {x}.", "Kể cho tôi nghe về {x}.", "Bạn biết gì về {x}?",
    "Cho tôi hỏi về {x}.",
]  # fmt: skip
WHERE = ["{X} ở đâu?", "{X} ở đâu vậy?", "Cho tôi hỏi {x} ở đâu?", "{X} nằm ở đâu?"]
TELL = ["Hãy nói về {x}.", "Cho tôi hỏi về {x}.", "Bạn biết gì về {x}?", "Kể cho tôi nghe về {x}."]

PEOPLE = (
    "nhà (?:văn|thơ|báo|vua|khoa học|toán học|vật lý|hóa học|sử học|triết học|soạn nhạc|hoạt động"
    "|cách mạng|chính trị|lãnh đạo|sản xuất|thiết kế|tu hành|nghiên cứu|ngoại giao|quân sự|nho)"
    "|người (?!Việt bản)|(?:nam |nữ )?(?:ca|nhạc|họa|thi|chiến|võ|danh|y|bác|giáo|kỹ|luật|tiến) sĩ"
    "|nhạc sĩ|diễn viên|cầu thủ|vận động viên|tay vợt|huấn luyện viên|kỹ sư|luật sư|giáo sư"
    "|(?:vị |ông )?(?:vua|tướng|hoàng đế|quân chủ|hoàng hậu|công chúa|hoàng tử|giám mục|hồng y)"
    "|chính khách|chính trị gia|đạo diễn|người mẫu|tổng thống|thủ tướng|giáo hoàng|đại tướng"
)
PLACES = (
    "thành phố|thị trấn|thị xã|huyện|xã|phường|quận|tỉnh|đô thị|làng|quốc gia|đảo|hòn đảo|quần đảo"
    "|sông|con sông|núi|ngọn núi|hồ|ga|nhà ga|sân bay|cảng|vịnh|bán đảo|vùng|khu vực|bang|hạt"
    "|đền|chùa|ngôi chùa|nhà thờ|lâu đài|pháo đài|trường|đại học|công viên|vườn quốc gia|xóm|ấp"
)
CLASSES = (
    "một|loài|loại|dạng|kiểu|nghề|tên|nơi|người|những|các|phương pháp|quá trình|hiện tượng|cách"
    "|chất|hợp chất|nguyên tố|bộ phận|phần|thuật ngữ|khái niệm|hệ thống|nhóm|môn|ngành|công cụ"
    "|thiết bị|món|lễ|ngày|đơn vị|tập hợp|hình thức|sản phẩm|cây|động vật|thực vật|tổ chức|cơ quan"
)
# A kind of question, how its answers begin ({x}: what is asked about), and ways to ask. A sentence
# becomes one question, of the first kind that fits.
CLAUSES = [  # asked about is an action or a clause, of three words at least
    ("how", "(?:Để|Nhằm|Muốn) {x}, ",
     ["Làm thế nào để {x}?", "Làm sao để {x}?", "Tôi muốn {x} thì làm thế nào?",
      "Muốn {x} thì phải làm gì?", "Cần làm gì để {x}?", "Chỉ tôi cách {x}."]),
    ("when", "(?:Mỗi khi|Sau khi|Khi) {x}, ",
     ["Điều gì xảy ra khi {x}?", "Chuyện gì xảy ra khi {x}?", "Khi {x} thì sao?"]),
    ("if", "Nếu {x}(?:,| thì) ",
     ["Điều gì xảy ra nếu {x}?", "Nếu {x} thì sao?", "Nếu {x} thì có sao không?"]),
    ("why", "{x} (?:chủ yếu |là |một phần )?(?:vì|bởi vì|do|nhờ) ",
     ["Tại sao {x}?", "Vì sao {x}?", "Vì sao {x} vậy?", "Cho tôi hỏi tại sao {x}?"]),
]  # fmt: skip
ADVISED = ["Nên làm gì khi {x}?", "Khi {x} thì nên làm gì?", "Cần làm gì khi {x}?"]
KINDS = [  # asked about is a thing
    ("use", "{x} (?:thường |còn |cũng |chủ yếu |hay |có thể )*(?:được )?(?:sử )?dùng (?:để|làm"
     "|trong|cho|như) ",
     ["{X} dùng để làm gì?", "{X} được dùng để làm gì?", "Người ta dùng {x} để làm gì?",
      "{X} được dùng vào việc gì?", "Tôi có thể dùng {x} làm gì?"]),
    ("lives", "{x} (?:thường |chủ yếu |cũng |chỉ )*(?:sinh )?sống (?:ở|tại|trong|trên|dưới) ",
     ["{X} sống ở đâu?", "{X} thường sống ở đâu?", "Có thể gặp {x} ở đâu?"]),
    ("grows", "{x} (?:thường |chủ yếu )*(?:mọc|được trồng) (?:ở|tại|trong|trên|dưới|hoang|nhiều) ",
     ["{X} mọc ở đâu?", "{X} được trồng ở đâu?", "Có thể tìm thấy {x} ở đâu?"]),
    ("found", "{x} (?:chủ yếu |thường |cũng |còn )*(?:(?:được tìm thấy|phân bố) (?:ở|tại|trong|trên"
     "|chủ yếu|rộng|nhiều|khắp)|(?:có mặt|xuất hiện|tập trung) (?:ở|tại|khắp|chủ yếu)) ",
     ["{X} có ở đâu?", "{X} phân bố ở đâu?", "Có thể tìm thấy {x} ở đâu?"]),
    ("lies", "{x} (?:nằm|tọa lạc|toạ lạc|đặt trụ sở|có trụ sở|nằm cách) (?:ở|tại|trên|trong|bên"
     "|giữa|phía|về|dọc|gần) ",
     WHERE),
    ("famous", "{x} (?:rất |cũng |được |đặc biệt |còn )*(?:nổi tiếng|nổi danh|được biết đến) "
     "(?:với|vì|về|nhờ|bởi|là|như) ",
     ["{X} nổi tiếng vì điều gì?", "{X} nổi tiếng về điều gì?", "Vì sao {x} nổi tiếng?",
      "{X} có gì nổi tiếng?"]),
    ("called", "{x} (?:còn |thường |cũng |đôi khi |hay )*(?:được |bị )?gọi (?:là|với|bằng) ",
     ["{X} còn được gọi là gì?", "{X} có tên gọi nào khác?", "Người ta gọi {x} là gì?"]),
    ("made", "{x} (?:thường |chủ yếu |có thể )*được (?:làm|chế tạo|sản xuất|chế biến|nấu|xây) "
     "(?:từ|bằng|với) ",
     ["{X} được làm từ gì?", "{X} làm bằng gì?", "{X} được làm như thế nào?"]),
    ("parts", "{x} (?:thường |chỉ |chủ yếu )*(?:bao gồm|gồm có|gồm|được chia thành|chia thành) ",
     ["{X} gồm những gì?", "{X} bao gồm những gì?", "Trong {x} có những gì?"]),
    ("belongs", "{x} (?:cũng |vốn |chủ yếu |trực )*thuộc ",
     ["{X} thuộc nhóm nào?", "{X} thuộc về đâu?", "Cho biết {x} thuộc loại nào."]),
    ("helps", "{x} (?:cũng |còn |sẽ |thường |có thể |rất )*(?:giúp|có tác dụng|có lợi|có ích"
     "|có vai trò|đóng vai trò|có ý nghĩa|quan trọng (?:đối với|với|vì|cho|trong)) ",
     ["{X} có tác dụng gì?", "{X} có ích gì?", "{X} giúp gì cho chúng ta?",
      "Vai trò của {x} là gì?"]),
    ("causes", "{x} (?:cũng |còn |sẽ |thường |có thể )*(?:gây (?!quỹ|dựng)|dẫn đến |dẫn tới "
     "|làm cho |khiến |ảnh hưởng |tạo ra |tạo nên )",
     ["{X} gây ra điều gì?", "{X} dẫn đến điều gì?", "{X} có ảnh hưởng gì?"]),
    ("needs", "{x} (?:thường |cũng |luôn |rất )*(?:cần|đòi hỏi) ",
     ["{X} cần gì?", "{X} cần những gì?", "Cần biết gì về {x}?"]),
    ("must", "{x} (?:thường |cũng |luôn |đã |sẽ )*(?:phải|buộc) ",
     ["{X} phải làm gì?", "{X} phải thế nào?", "Cho tôi biết {x} phải làm gì."]),
    ("begins", "{x} (?:được |chính thức )*(?:thành lập|ra đời|xây dựng|khởi công|ra mắt|phát hành"
     "|khánh thành) (?:vào|từ|ngày|năm|tháng|lần đầu|trong) ",
     ["{X} có từ khi nào?", "{X} có từ bao giờ?", "{X} ra đời năm nào?"]),
    ("takes place", "{x} (?:được |chính thức )*(?:công bố|tổ chức|diễn ra) "
     "(?:vào|từ|ngày|năm|tháng|trong) ",
     ["{X} diễn ra khi nào?", "{X} vào lúc nào?", "Cho tôi hỏi {x} diễn ra khi nào?"]),
    ("differs", "{x} (?:rất |hơi |có phần )*(?:khác (?:với|biệt|nhau|hẳn)|giống (?:với|như|nhau)"
     "|tương tự (?:với|như)|(?:lớn|nhỏ|cao|thấp|tốt|nặng|nhẹ|ít|nhiều) hơn) ",
     ["{X} khác ở điểm nào?", "{X} có gì khác?", "{X} như thế nào?"]),
    ("can", "{x} (?:cũng |còn |không )?có thể ",
     ["{X} có thể làm gì?", "{X} có thể thế nào?", "Điều gì có thể xảy ra với {x}?"]),
    ("usually", "{x} (?:thường|luôn) ",
     ["{X} thường thế nào?", "{X} thường ra sao?", "{X} như thế nào?"]),
    ("isa", "{x} (?:cũng |vốn |vẫn |chính )?là (?:" + CLASSES + ") ", ABOUT),
    ("whether", "{x} có (?P<y>(?!thể|lẽ|khi|những|các|một|nhiều|hai|ba|được|số|in)[^\\W\\d_]+(?: "
     "[^\\W\\d_]+){0,2}?)(?<!hơn)(?<!nhất) (?:và|ở|để|với|trong|trên|từ|của|là|được|cho|như|nằm"
     "|thuộc) ",
     ["{X} có {y} không?", "Có phải {x} có {y} không?"]),
    ("has", "{x} có ",
     ["{X} có đặc điểm gì?", "{X} có gì?", "{X} có gì đặc biệt?", "{X} như thế nào?",
      "Đặc điểm của {x} là gì?"]),
    ("becomes", "{x} (?:đã |sẽ |dần |nhanh chóng )*trở (?:thành|nên) ",
     ["{X} trở thành gì?", "{X} trở nên thế nào?", "{X} đã thay đổi ra sao?"]),
    ("done", "{x} (?:đã |sẽ |đang |cũng |chỉ |còn |từng )*(?:được|bị) ",
     ["Điều gì xảy ra với {x}?", "{X} thì sao?", *TELL]),
    ("does", "{x} (?:đã|sẽ|đang|bắt đầu|(?<!hàng )không|chịu|sử dụng|mang|nhận|giữ|tạo|chứa"
     "|phát triển|tăng|giảm|đạt|đóng|sinh|phụ thuộc|diễn ra|xảy ra|xuất hiện|đến từ|giáp|dài|rộng"
     "|cao) ",
     ["{X} làm gì?", "{X} ra sao?", *TELL]),
]  # fmt: skip
TWICE = words(
    "who place title isa how if why use when has usually parts can lies helps causes begins whether"
)
SPAN = r"(?P<x>\w[\w-]*(?: \w[\w-]*){%s,5}?)"
CLAUSES = [(kind, re.compile("^" + p.replace("{x}", SPAN % 2)), f) for kind, p, f in CLAUSES]
KINDS = [(kind, re.compile("^" + p.replace("{x}", SPAN % 0)), f) for kind, p, f in KINDS]
# Sentences whose second half is put first, so that what is asked about comes early.
BECAUSE = re.compile(r"^(?:Vì|Do|Bởi|Bởi vì) ([^,]+),? (?:nên|cho nên) ([^,.]+)(?:,[^.]*)?\.$")
TAIL = re.compile(r"^([^,]{20,}) (nhằm|để|khi|sau khi|nếu) (\w+(?: [^\W\d_]+){2,5})\.$")


class Names:
    """Which words are written small inside a sentence, counted from the text itself."""

    def __init__(self, texts: Iterable[str]):
        self.small, self.large = Counter(), Counter()
        for text in texts:
            for word in re.findall(r"(?<=[a-zà-ỹ,] )[^\W\d_]+", text):
                (self.large if word[0].isupper() else self.small)[word.casefold()] += 1

    def inside(self, phrase: str) -> str:
        """The phrase as one writes it in the middle of a sentence: 'Con mèo' -> 'con mèo'."""
        first, _, rest = phrase.partition(" ")
        small, large = self.small[first.casefold()], self.large[first.casefold()]
        surely = 0.95 if rest[:1].isupper() else 0.3 if rest else 0.7
        if first[1:] == first[1:].lower() and small > surely * (small + large):
            return phrase[0].lower() + phrase[1:]
        return phrase


def mine(title: str, text: str, names: Names, rng: random.Random) -> Iterator[Question]:
    """The questions that an article's sentences answer."""
    for n, answer in enumerate(sentences(text)):
        found = ask_about_title(title, answer, names, rng) if n == 0 else []
        if not found:
            found = ask(answer, names, rng)
        yield from (q for q in found if names_its_phrase(q))


def ask_about_title(title: str, answer: str, names: Names, rng: random.Random) -> list[Question]:
    """What an article is about, answered by its first sentence."""
    phrase, rest = answer[: len(title)], answer[len(title) :]
    if phrase.casefold() != title.casefold() or not rest.startswith((" ", ",")):
        return []
    if len(title.split()) > 6 or title.casefold().split()[0] in words("ngày tháng năm danh"):
        return []
    is_a = r"(?: |, .*, |, )(?:từng |vốn )?là (?:một |vị |tên |ngôi |nhà ga |tên gọi )*"
    if re.search(is_a + f"(?:{PEOPLE})", rest):
        kind, forms = "who", WHO
    elif re.search(is_a + f"(?:{PLACES})", rest) and re.search(r" (ở|tại|thuộc|nằm) ", rest):
        kind, forms = "place", WHERE + ABOUT
    elif re.search(r"\blà ", " ".join(rest.split()[:12])):
        kind, forms = "title", ABOUT
    else:
        kind, forms = "tell", TELL
    return put(kind, phrase, answer, forms, names, rng)


def ask(answer: str, names: Names, rng: random.Random) -> list[Question]:
    """The question of the first kind that the sentence answers, in a list; or none."""
    answer = tail_first(answer, names)
    for kind, pattern, forms in CLAUSES:
        if (found := pattern.match(answer)) and is_clause(found["x"], answer):
            if kind == "why" and not is_statement(found["x"]):
                continue
            if kind == "when" and re.search(r", .*\b(nên|cần|phải|hãy) ", answer):
                forms = ADVISED
            return put(kind, found["x"], answer, forms, names, rng)
    for kind, pattern, forms in KINDS:
        if (found := pattern.match(answer)) and is_noun_phrase(found["x"]):
            y = found.groupdict().get("y", "")
            return put(kind, found["x"], answer, forms, names, rng, y)
    return []


def tail_first(sentence: str, names: Names) -> str:
    """'Người ta đắp đê để ngăn lũ lớn.' -> 'Để ngăn lũ lớn, người ta đắp đê.'; others as they are.

    'Vì trời lạnh nên cây không mọc.' -> 'Cây không mọc vì trời lạnh.'
    """
    if because := BECAUSE.match(sentence):
        cause, effect = because.groups()
        return f"{effect[0].upper()}{effect[1:]} vì {cause}."
    if tail := TAIL.match(sentence):
        main, link, clause = tail.groups()
        if main.split()[-1] not in UNTURNED and clause.split()[0] not in NOT_A_CLAUSE:
            return f"{link.capitalize()} {clause}, {names.inside(main)}."
    return sentence


def is_statement(phrase: str) -> bool:
    """Whether a noun phrase and a verb are there, as in 'Cây không mọc'."""
    verb = r" (?:không|bị|có|rất|đã|thường|phải|chưa|trở|được|tăng|giảm|mất|thất|chết|dễ|khó) "
    subject, *predicate = re.split(verb, phrase)
    unfinished = phrase.split()[-1] in words("tự lý lí thể có là")
    return bool(predicate) and is_noun_phrase(subject) and not unfinished


def put(
    kind: str, phrase: str, answer: str, forms: list[str], names: Names, rng: random.Random,
    y: str = "",
) -> list[Question]:  # fmt: skip
    """The question in one of its forms; in two, for the kinds of which people ask most."""
    inside = names.inside(phrase)
    forms = rng.sample(forms, 2 if kind in TWICE else 1)
    return [Question(kind, phrase, f.format(X=phrase, x=inside, y=y), answer) for f in forms]


def names_its_phrase(question: Question) -> bool:
    """The phrase stands among the first words of the answer, which is 8 to 40 words."""
    at = question.answer.casefold().find(question.phrase.casefold())
    return 0 <= at <= 12 and 8 <= len(question.answer.split()) <= 40


class Overlap:
    """Whether a phrase equals, contains or is contained in one of the topics, word by word."""

    def __init__(self, topics: Iterable[str]):
        self.topics = {self.words(topic) for topic in topics}
        self.parts = {part for topic in self.topics for part in self.runs(topic)}

    def __contains__(self, phrase: str) -> bool:
        phrase = self.words(phrase)
        return phrase in self.parts or any(run in self.topics for run in self.runs(phrase))

    @staticmethod
    def words(text: str) -> tuple[str, ...]:
        return tuple(re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold()))

    @staticmethod
    def runs(seq: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        return (seq[i:j] for i in range(len(seq)) for j in range(i + 1, len(seq) + 1))


def choose(questions: list[Question], length: int, cap: int, rng: random.Random) -> list[Question]:
    """Questions of about `length` characters in all, a phrase at most `cap` times, kinds in turn.

    Kinds take turns until they run dry, so that the rare ones are all there.
    """
    of_kind, times = defaultdict(list), Counter()
    for question in rng.sample(questions, len(questions)):
        times[question.phrase.casefold()] += 1
        if times[question.phrase.casefold()] <= cap:
            of_kind[question.kind].append(question)
    chosen = []
    for question in filter(None, chain.from_iterable(zip_longest(*of_kind.values()))):
        if length <= 0:
            break
        chosen.append(question)
        length -= len(TEMPLATES["4B-Chat"][0].format(q=question.question, a=question.answer)) - 5
    return rng.sample(chosen, len(chosen))


def pages(questions: list[Question], rng: random.Random, chat: float = 0.75) -> list[str]:
    """Documents of 6 to 10 questions and answers of one template; a share `chat` is 4B-Chat's."""
    out, rest = [], list(questions)
    while len(rest) >= 6:
        count = rng.randint(6, 10)
        page, rest = rest[-count:], rest[:-count]
        template, between = TEMPLATES["4B-Chat" if rng.random() < chat else "7B5-Instruct"]
        out.append(between.join(template.format(q=q.question, a=q.answer) for q in page))
    return out
