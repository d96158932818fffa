module;
#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace {

constexpr std::string_view byte_order_mark = "\xEF\xBB\xBF";

std::string_view trim_newline(std::string_view line) {
    while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) line.remove_suffix(1);
    return line;
}

std::string_view trim_tabs(std::string_view line) {
    line.remove_prefix(std::min(line.find_first_not_of('\t'), line.size()));
    return line;
}

/// Lines with their ends, counted.
class line_reader {
public:
    line_reader(std::string_view text, const std::string& name) : text_(text), name_(name) {
        if (text_.starts_with(byte_order_mark)) at_ = byte_order_mark.size();
    }

    std::optional<std::string_view> next() {
        if (at_ >= text_.size()) return std::nullopt;
        const std::size_t end = text_.find('\n', at_);
        const std::string_view line = text_.substr(at_, end == std::string_view::npos ? text_.size() - at_ : end + 1 - at_);
        ++number_;
        if (trim_newline(line).size() > max_line)
            throw error{errc::invalid, cat("dockerfile line greater than max allowed size of ", max_line)}.at({name_, number_});
        at_ += line.size();
        return line;
    }

    [[nodiscard]] unsigned number() const { return number_; }
    [[nodiscard]] std::size_t at() const { return at_; }
    [[nodiscard]] std::string_view rest() const { return text_.substr(std::min(at_, text_.size())); }
    void skip_to(std::size_t at, unsigned number) {
        at_ = at;
        number_ = number;
    }

private:
    std::string_view text_;
    const std::string& name_;
    std::size_t at_ = 0;
    unsigned number_ = 0;
};

/// Where whole lines of a given text stand; made once, and only for a here-document where there may be none.
class line_index {
public:
    struct place {
        std::size_t end;  ///< offset behind the line
        unsigned number;
    };

    explicit line_index(std::string_view text) {
        std::size_t at = 0;
        for (unsigned number = 1; at < text.size(); ++number) {
            const std::size_t end = std::min(text.find('\n', at), text.size() - 1) + 1;
            const std::string_view line = trim_newline(text.substr(at, end - at));
            places_[line].push_back({end, number});
            if (line.starts_with('\t')) indented_[trim_tabs(line)].push_back({end, number});
            at = end;
        }
    }

    std::optional<place> find_after(const heredoc& h, unsigned number) const {
        std::optional<place> found = first_after(places_, h.name, number);
        if (h.chomp) {
            const auto other = first_after(indented_, h.name, number);
            if (other && (!found || other->number < found->number)) found = other;
        }
        return found;
    }

private:
    using table = std::unordered_map<std::string_view, std::vector<place>>;
    static std::optional<place> first_after(const table& t, std::string_view line, unsigned number) {
        const auto entry = t.find(line);
        if (entry == t.end()) return std::nullopt;
        const auto it = std::upper_bound(entry->second.begin(), entry->second.end(), number, [](unsigned n, const place& p) { return n < p.number; });
        return it == entry->second.end() ? std::nullopt : std::optional(*it);
    }

    table places_, indented_;
};

class parser {
public:
    explicit parser(file& out) : out_(out), in_(out.text, out.name) {}

    void run() {
        while (const auto raw = in_.next()) {
            const std::string_view line = trim_left(trim_newline(*raw));
            if (line.starts_with('#')) {
                comment(line);
                continue;
            }
            in_directives_ = false;
            if (line.empty()) {
                comments_.clear();
                continue;
            }
            instruction(line);
        }
        if (out_.nodes.empty()) throw error{errc::invalid, cat("file with no instructions: ", out_.name)}.at({out_.name, in_.number()});
    }

private:
    void comment(std::string_view line) {
        if (in_directives_) {
            if (auto found = match_directive(line, "#")) {
                found->line = in_.number();
                add(*std::move(found));
                return;
            }
            in_directives_ = false;
        }
        const std::string_view text = trim(line.substr(1));
        if (text.empty()) {
            comments_.clear();
        } else {
            comments_.emplace_back(text);
        }
    }

    void add(directive found) {
        if (out_.find(found.name) != nullptr)
            throw error{errc::invalid, cat("only one ", found.name, " parser directive can be used")}.at({out_.name, found.line});
        if (found.name == "escape") {
            if (found.value != "`" && found.value != "\\")
                throw error{errc::invalid, cat("invalid escape token ", quoted(found.value), ": it must be ` or \\")}.at({out_.name, found.line});
            out_.escape = found.value[0];
        }
        out_.directives.push_back(std::move(found));
    }

    /// Takes the escape character at the end off; true when the next line continues this one.
    [[nodiscard]] bool strip_continuation(std::string_view& line) const {
        std::string_view bare = line;
        while (!bare.empty() && (bare.back() == ' ' || bare.back() == '\t')) bare.remove_suffix(1);
        if (bare.empty() || bare.back() != out_.escape) return false;
        bare.remove_suffix(1);
        if (!bare.empty() && bare.back() == out_.escape) return false;
        line = bare;
        return true;
    }

    void instruction(std::string_view line) {
        const unsigned start = in_.number();
        bool more = strip_continuation(line);
        std::string joined(line);
        bool blank_inside = false;
        while (more) {
            const auto raw = in_.next();
            if (!raw) break;
            std::string_view next = trim_newline(*raw);
            const std::string_view text = trim_left(next);
            if (text.starts_with('#')) continue;
            if (text.empty()) {
                blank_inside = true;
                continue;
            }
            more = strip_continuation(next);
            joined += next;
        }
        node n = parse_logical_line(std::move(joined), out_.escape);
        n.comments = std::exchange(comments_, {});
        if (blank_inside) n.empty_continuation = in_.number();
        if (n.original.find("<<") != std::string::npos) heredocs(n, start);
        n.lines = {start, in_.number()};
        if (!n.trigger.empty()) {
            n.trigger.front().heredocs = n.heredocs;
            n.trigger.front().lines = n.lines;
        }
        out_.nodes.push_back(std::move(n));
    }

    void heredocs(node& n, unsigned start) {
        const bool takes = takes_heredocs(n);
        if (!takes && n.json) return;
        std::vector<heredoc> found;
        for (const auto& word : heredoc_aware_words(n.original))
            if (auto h = parse_heredoc_word(word)) found.push_back(*std::move(h));
        if (found.empty()) return;
        if (!takes) return refuse_heredocs(n, found);
        for (auto& h : found) read_body(h, start);
        n.heredocs = std::move(found);
    }

    void read_body(heredoc& h, unsigned start) {
        while (const auto raw = in_.next()) {
            const std::string_view line = trim_newline(*raw);
            if ((h.chomp ? trim_tabs(line) : line) == h.name) return;
            h.content += *raw;
        }
        throw error{errc::invalid, cat("unterminated heredoc: no line ", quoted(h.name), " ends the text that <<", h.name, " begins")}.at(
            {out_.name, start});
    }

    /// The lines are a here-document only when all their ends are there; else `<<` is text like any other.
    void refuse_heredocs(node& n, const std::vector<heredoc>& found) {
        if (!index_) index_.emplace(out_.text);
        std::optional<line_index::place> end;
        for (const auto& h : found) {
            end = index_->find_after(h, end ? end->number : in_.number());
            if (!end) return;
        }
        in_.skip_to(end->end, end->number);
        n.problem = cat(to_upper(n.keyword), " does not take a here-document (<<", found.front().name, "): only RUN, COPY and ADD do");
    }

    file& out_;
    line_reader in_;
    bool in_directives_ = true;
    std::vector<std::string> comments_;
    std::optional<line_index> index_;
};

}  // namespace

const directive* file::find(std::string_view directive_name) const {
    for (const auto& d : directives)
        if (d.name == directive_name) return &d;
    return nullptr;
}

std::string heredoc::text() const {
    if (!chomp) return content;
    std::string out;
    out.reserve(content.size());
    bool at_start = true;
    for (const char c : content) {
        if (at_start && c == '\t') continue;
        out += c;
        at_start = c == '\n';
    }
    return out;
}

file parse(std::string_view text, std::string_view name) {
    file out;
    out.name = name;
    out.text = text;
    parser(out).run();
    return out;
}

node parse_line(std::string_view text, char escape) {
    file out;
    out.name = "instruction";
    out.text = text;
    out.escape = escape;
    parser(out).run();
    if (out.nodes.size() != 1) throw error{errc::invalid, cat("expected a single instruction, found ", out.nodes.size(), ": ", quoted(text))};
    return std::move(out.nodes.front());
}

}  // namespace cobuild::dockerfile
