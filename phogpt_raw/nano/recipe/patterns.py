"""The kinds of questions. A kind has a pattern for its answers, and several forms of its question.

CLAUSES and KINDS are lists of (kind, pattern, forms). `pattern` is a regular expression that
matches the beginning of an answer. The group `x` of this expression matches the subject of the
question. In KINDS the subject is a thing. In CLAUSES the subject is an action or a clause, and has
three words or more. `forms` are questions with {x} or {X} in place of the subject. {x} stands for
the subject as it is written inside a sentence. {X} stands for the subject as it is written at the
beginning of a sentence. The order of the kinds matters, because a sentence becomes a question of
the first kind whose pattern matches.
"""

import re

from phogpt_raw.nano.recipe.phrases import words

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
CLAUSES = [
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
KINDS = [
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
TWICE = words(  # kinds for which a sentence becomes two questions
    "who place title isa how if why use when has usually parts can lies helps causes begins whether"
)
SPAN = r"(?P<x>\w[\w-]*(?: \w[\w-]*){%s,5}?)"
CLAUSES = [(kind, re.compile("^" + p.replace("{x}", SPAN % 2)), f) for kind, p, f in CLAUSES]
KINDS = [(kind, re.compile("^" + p.replace("{x}", SPAN % 0)), f) for kind, p, f in KINDS]
