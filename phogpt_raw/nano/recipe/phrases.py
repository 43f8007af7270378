"""Decide which phrases of a sentence a question may be about.

A question is never about a pronoun, about a noun that refers to an earlier sentence, or about a
fragment that a pattern cut in the wrong place. The word lists were improved after the resulting
questions had been read. This module uses no word segmenter, and a few questions in a hundred are
still wrong.
"""

import re


def words(text: str) -> set[str]:
    return set(text.split())


POINTING = words(  # words that refer to another sentence
    "này đó ấy kia nó họ chúng hắn ta tôi mình đây ông bà ngài thế vậy nọ trên dưới sau trước"
)
BROKEN = words(  # words that no noun phrase contains; the pattern has matched too many words
    "thì mà là nhưng rằng cũng vẫn đã đang sẽ chỉ rất không chưa bị được nên hãy ai gì đâu nào"
    " sao nếu khi vì bởi trở cho thấy nói biết có thường phải để tuy dù hoặc hơn khiến ở gồm viết"
    " giết đánh đưa lấy gửi xây chết đi gọi nằm lại từng vừa càng luôn ra vào đến bao nhờ"
)
OPENERS = words(  # words that cannot begin a noun phrase
    "trong trên tại theo từ với khi sau trước ngoài tuy dù mặc nhưng và hay hoặc do vì bởi để"
    " như cũng đến vào ở cho bằng qua về mỗi một những nhiều có không đã sẽ đang nếu thế vậy rồi"
    " còn ngày năm tháng hiện ban lúc cả hai ba bốn mọi hầu đa phần bên dưới giữa nhờ nói gần"
    " được bị chỉ cùng cuối đầu điều nó ông bà anh chị cô họ chúng đây đó này hắn ngài tôi ta"
    " mình y gã ai tất số kể tính hơn khoảng thường đặc thực nhiên vốn nay xưa kết suốt vẫn rất"
    " khá lại đôi phải càng trừ vừa mới dựa xung khác hàng nên bấy thậm mãi chưa thay dường nhằm"
    " muốn xét riêng xin trải nhìn hễ giả kèm dọc đúng dẫu ngay trái bắt tương đồng tiếp cách"
    " chừng xuất ví là gộp thời tổng gồm giống quen mà nến sống cộng bao thì"
)
ENDINGS = words(  # words that cannot end a noun phrase
    "của và với cho trong trên tại ở từ cũng vẫn còn chỉ rất chủ đều lại mà như hay những các"
    " một luôn vốn từng hiện nay theo do gồm sau khác mới nhất ra đến cả tới vào về càng trước"
    " giờ lần ban nhau mỗi nhiều đầu nguyên phụ cấu chung cùng yếu riêng nấu thực đồng hầu trực"
    " tự dần bắt nhanh chóng lượt ngay gần chính đang việc đám món thích gặp chối chịu thiết mở"
    " thông sắp dễ tiếp muốn tính đứng đóng trợ xem sợ giữ tìm ép chấp xác cấp đạt định"
)
# A phrase that consists of one of these nouns alone refers to an earlier sentence. The character _
# joins the syllables of a word.
DANGLING = words(
    "nguyên_nhân lý_do lí_do kết_quả mục_tiêu mục_đích ví_dụ vấn_đề tên con_trai con_gái cha mẹ"
    " vợ chồng tác_giả tác_phẩm bài_hát bộ_phim album ca_khúc trò_chơi cuốn_sách truyện phim"
    " thành_phố thị_trấn huyện xã tỉnh đất_nước công_ty trường loài chi đảo trận_đấu dân_số"
    " diện_tích vua anh em quân_đội chính_phủ đội câu_lạc_bộ nhóm tổng_số nhân_vật nhân_vật_chính"
    " thị_xã quận phường nhà_vua nước quốc_gia khu_vực vùng ga dự_án tiểu_thuyết cuốn_tiểu_thuyết"
    " đĩa_đơn bản_thân triều_đại tổ_chức sự_kiện việc sự tình_hình kể_từ tuy_nhiên mặt_khác"
    " cha_mẹ gia_đình chương cảng loại giá mức lực hệ bộ cấp số thân hội ban kết_luận hệ_quả"
    " hậu_quả phiên_bản tòa_nhà toà_nhà sông hồ núi làng bang hạt giải mùa_giải tập_đoàn tổng_cục"
    " quyển_sách đám món cục phân_khu dân_gian bản_đồ tỉnh_lỵ nhà thuật_ngữ từ_này quân_ta dân"
    " trạm"
)


VERB_LAST = re.compile(
    r" (?:tuyên bố|quyết định|yêu cầu|phản đối|cố gắng|góp công|từ khước|tiếp tục|đề nghị|ra lệnh"
    r"|một vai trò|cho phép|chủ trương|đồng ý|kêu gọi|tìm cách|dự định|ước tính|mong|lo"
    r"|dám|về mặt|phần lớn|chẳng hạn|cơ sở|sử dụng)$"
)
NOT_A_CLAUSE = words(
    "còn đến lên về trở tới đó thế vậy và hay tuy bản chỉ tính kể xét so theo thành lại cho mà nào"
)
UNTURNED = words(  # a clause after one of these words depends on the word and cannot be moved
    "dùng đủ cách hội gian thiết việc tiền là và hay hoặc sau trước từ đến trong ngay mỗi hơn"
    " chỉ nhất kể cho tới cả phép chờ đợi điều kiện nhằm để khi cần phải được lúc quá vậy nhau"
    " khác như vì lý"
)


def is_noun_phrase(phrase: str) -> bool:
    """Return whether a question may be about the phrase.

    The phrase must have 1 to 6 words. It must not be a pronoun or a fragment.
    """
    low = phrase.casefold().split()
    return (
        1 <= len(low) <= 6
        and len(phrase) >= 3
        and low[0] not in OPENERS
        and low[-1] not in ENDINGS
        and not POINTING & set(phrase.split()[1:])
        and not BROKEN & set(phrase.split()[1:])
        and "_".join(low) not in DANGLING
        and not any(map(str.isdigit, phrase.split()[0]))
        and phrase[0].isupper()
        and (len(low) > 2 or low[0] not in words("các việc sự cuộc cái"))
        and not VERB_LAST.search(phrase)
    )


def is_clause(phrase: str, answer: str) -> bool:
    """Return whether a question may be about the clause.

    The clause and its answer must not refer to another sentence.
    """
    pointers = POINTING - words("trên dưới sau trước") | words("anh cô nàng chàng cậu Ông Bà")
    low = phrase.split()
    return (
        len(low) <= 6
        and not pointers & set(re.findall(r"\w+", answer)[1:])
        and not words("thì mà rằng nếu khi là") & set(low)
        and not re.search(r"\d", phrase)
        and low[-1] not in ENDINGS | words("bị được không đã rất để có phải")
        and low[0].casefold() not in NOT_A_CLAUSE
    )
